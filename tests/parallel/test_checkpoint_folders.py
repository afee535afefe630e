"""A checkpoint folder that two ranks write is whole or not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_jobs import Trained, run
from ranks import Ranks
from resume_jobs import source
from small_disk import mounted
from torn import tear_folder

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def whole(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A model, and a run of it that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    model = source(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_DPO_CACHE", str(folder / "cache"))
        return model, ranks.run(run, model=model, strategy="fsdp2")


def assert_same_bits(one: Trained, other: Trained) -> None:
    assert one.steps == other.steps
    torch.testing.assert_close(one.weights, other.weights, rtol=0, atol=0)


@pytest.mark.parametrize("moment", ["half", "between renames"])
def test_a_run_killed_while_it_saves(ranks: Any, whole: tuple[str, Any], tmp_path: Path, moment: str) -> None:
    (model, uncut), folder = whole, tmp_path / "run"
    doomed = Ranks(2)
    with pytest.raises((EOFError, RuntimeError)):
        doomed.run(tear_folder, moment=moment, model=model, strategy="fsdp2", last=folder)
    doomed.stop()
    checkpoint = folder / "last.ckpt"
    assert (folder / ".last.ckpt.partial").is_dir()
    assert checkpoint.is_dir() == (moment == "half")
    resumed = ranks.run(run, model=model, strategy="fsdp2", last=folder, ckpt_path=checkpoint)
    assert_same_bits(resumed[0], uncut[0])
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]


def test_the_last_checkpoint_is_found_after_a_kill_between_renames(
    ranks: Any, whole: tuple[str, Any], tmp_path: Path
) -> None:
    (model, uncut), folder = whole, tmp_path / "run"
    doomed = Ranks(2)
    with pytest.raises((EOFError, RuntimeError)):
        doomed.run(tear_folder, moment="between renames", model=model, strategy="fsdp2", last=folder)
    doomed.stop()
    assert not (folder / "last.ckpt").exists()
    resumed = ranks.run(run, model=model, strategy="fsdp2", last=folder, ckpt_path="last")
    assert len(resumed[0].seen) < len(uncut[0].seen)  # it went on, and did not begin again
    assert_same_bits(resumed[0], uncut[0])
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", size="1600k") as folder:
        yield folder


def test_a_full_disk(ranks: Any, whole: tuple[str, Any], small_disk: Path) -> None:
    model, uncut = whole
    options = {"model": model, "strategy": "fsdp2"}
    # Which of torch's writers finds the disk full first is a matter of chance, and so is what it says.
    with pytest.raises(RuntimeError, match=r"could not be written: (No space left|.*\d bytes were free)"):
        ranks.run(run, last=small_disk, **options)
    checkpoint = small_disk / "last.ckpt"
    assert list(small_disk.iterdir()) == [checkpoint]
    assert_same_bits(ranks.run(run, ckpt_path=checkpoint, **options)[0], uncut[0])


def test_a_folder_with_other_things_in_it_keeps_them(ranks: Any, tmp_path: Path) -> None:
    model, folder = source(tmp_path / "model"), tmp_path / "run"
    (folder / "last.ckpt").mkdir(parents=True)
    (folder / "last.ckpt" / "notes.txt").write_text("mine")
    ranks.run(run, model=model, strategy="fsdp2", last=folder)
    assert (folder / "last.ckpt" / "notes.txt").read_text() == "mine"
    assert (folder / "last.ckpt" / "meta.pt").is_file()
