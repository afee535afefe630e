"""A checkpoint is whole or not there, whatever happens while it is written."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import FSDPStrategy
from processes import process_context
from resume_jobs import source, train
from small_disk import mounted
from tiny_models import tiny_model
from torn import last, train_and_tear
from training import loader, sgd, trainer

from lightning_dpo import DPOModule
from lightning_dpo.parallel import FSDP1Strategy
from lightning_dpo.training.saving.checkpoint_io import (
    AtomicCheckpointIO,
    partial_name,
    put_in_place,
    unwritable,
)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("whole")
    return train(source(folder / "model")), str(folder / "model")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["half", "not renamed"])
def test_a_run_killed_while_it_saves(whole: Any, tmp_path: Path, moment: str) -> None:
    module, model = whole
    process = process_context().Process(
        target=train_and_tear, args=(model, tmp_path), kwargs={"moment": moment}
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    checkpoint = tmp_path / "last.ckpt"
    assert partial_name(checkpoint).exists()
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    callbacks, options = [last(tmp_path)], {"enable_checkpointing": True}
    resumed = train(model, ckpt_path=checkpoint, callbacks=callbacks, trainer_options=options)
    expected = module.policy.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.policy.state_dict().items())
    assert names(tmp_path) == ["last.ckpt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", size="1m") as folder:
        yield folder


@pytest.mark.slow
def test_a_full_disk(whole: Any, small_disk: Path) -> None:
    module, model = whole
    with pytest.raises(
        OSError, match=r"could not be written: No space left on device\. Older ones are as they"
    ):
        train(model, folder=small_disk)
    (kept,) = small_disk.iterdir()
    assert kept.name == "step=1.ckpt"
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    resumed = train(model, folder=small_disk, ckpt_path=kept)
    expected = module.policy.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.policy.state_dict().items())


def fit(**options: Any) -> Any:
    run = trainer(**options)
    run.fit(DPOModule(tiny_model(), optimizer=sgd), loader())
    return run


def test_a_users_own_way_to_save_is_kept(tmp_path: Path) -> None:
    class Own(TorchCheckpointIO):
        pass

    own = Own()
    assert fit(plugins=[own], max_steps=1).strategy.checkpoint_io is own
    assert type(fit(max_steps=1).strategy.checkpoint_io) is AtomicCheckpointIO
    assert type(fit(plugins=[TorchCheckpointIO()], max_steps=1).strategy.checkpoint_io) is AtomicCheckpointIO


def test_urls_work() -> None:
    run = fit(max_steps=1)
    run.save_checkpoint("memory://runs/run.ckpt")
    again = trainer(max_epochs=2)
    again.fit(DPOModule(tiny_model(), optimizer=sgd), loader(), ckpt_path="memory://runs/run.ckpt")
    assert again.global_step == 8  # as if it had not stopped


def test_a_file_url_is_a_file(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"a": 1}, f"file://{tmp_path}/new/run.ckpt")
    assert torch.load(tmp_path / "new" / "run.ckpt") == {"a": 1}
    assert names(tmp_path / "new") == ["run.ckpt"]


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "run.ckpt").mkdir()
    with pytest.raises(IsADirectoryError, match=r"could not be written: Is a directory.*run\.ckpt"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "run.ckpt")
    assert names(tmp_path) == ["run.ckpt"]


def test_an_error_without_its_cause_says_how_full_the_disk_is(tmp_path: Path) -> None:
    error = unwritable(tmp_path / "run.ckpt", RuntimeError("unexpected pos 704 vs 598"))
    assert isinstance(error, OSError)
    assert re.search(r"unexpected pos 704 vs 598 \([\d,]+ bytes were free there\)", str(error))


def test_what_cannot_be_pickled_says_so(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"(?i)pickle"):
        AtomicCheckpointIO().save_checkpoint({"f": lambda: None}, tmp_path / "run.ckpt")
    assert names(tmp_path) == []


def test_what_killed_runs_left_is_tidied_up(tmp_path: Path) -> None:
    """Old temporaries go, another run's stay, and a folder that was about to be replaced is put back."""
    for name in (".a.ckpt.partial", ".b.ckpt.partial", ".c.ckpt.previous", ".d.ckpt.previous", "d.ckpt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text(name)
    hours_ago = time.time() - 2 * 3600
    for path in (tmp_path / ".a.ckpt.partial" / "part", tmp_path / ".a.ckpt.partial"):
        os.utime(path, (hours_ago, hours_ago))
    fit(max_steps=1, enable_checkpointing=True, callbacks=[last(tmp_path)])
    assert names(tmp_path) == [".b.ckpt.partial", "c.ckpt", "d.ckpt"]
    assert (tmp_path / "d.ckpt" / "part").read_text() == "d.ckpt"


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "step=1.ckpt").mkdir()
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    new = partial_name(tmp_path / "last.ckpt")
    new.mkdir()
    put_in_place(new, tmp_path / "last.ckpt")
    assert names(tmp_path) == ["last.ckpt", "step=1.ckpt"]
    assert not (tmp_path / "last.ckpt").is_symlink()


def test_fsdp1_writes_its_folder_beside_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for Lightning's own part, which needs a GPU."""
    target = tmp_path / "last.ckpt"

    def write(strategy: Any, checkpoint: dict[str, Any], path: Path, *_: Any) -> None:
        assert path == partial_name(target)
        path.mkdir()
        (path / "meta.pt").write_text(checkpoint["text"])
        if checkpoint["text"] == "torn":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(FSDPStrategy, "save_checkpoint", write)
    strategy = FSDP1Strategy(state_dict_type="sharded", parallel_devices=[torch.device("cpu")])
    strategy.cluster_environment = LightningEnvironment()
    for text in ("first", "second"):
        strategy.save_checkpoint({"text": text}, target)
        assert (target / "meta.pt").read_text() == text
    with pytest.raises(OSError, match=r"could not be written: No space left on device\. Older ones"):
        strategy.save_checkpoint({"text": "torn"}, target)
    assert (target / "meta.pt").read_text() == "second"
    assert names(tmp_path) == ["last.ckpt"]
