from __future__ import annotations

import random
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from processes import process_context
from resume_jobs import source, train
from tiny_models import tiny_model
from training import loader, sgd, trainer

from lightning_dpo import DPOModule
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.models.weight_sums import same_weights, weight_sums
from lightning_dpo.training.callbacks.exact_resume import ExactResume, rescale_progress


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule that does not depend on the length of the run."""
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


STEADY = {"lr_scheduler": constant, "validate": False}


def assert_same_bits(one: torch.nn.Module, other: torch.nn.Module) -> None:
    theirs = other.state_dict()
    torch.testing.assert_close(one.state_dict(), theirs, rtol=0, atol=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that was never stopped, and a checkpoint of each of its steps."""
    folder = tmp_path_factory.mktemp("whole")
    return train(source(folder / "model"), folder=folder), folder


@pytest.fixture(scope="module")
def steady(whole: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with a schedule that does not depend on its length, and without validation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path_factory.mktemp("steady")))
        return train(str(whole[1] / "model"), **STEADY)


@pytest.mark.slow
def test_from_any_step_the_rest_is_the_same(whole: Any) -> None:
    module, folder = whole
    checkpoints = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    assert len(checkpoints) == module.trainer.global_step > 8
    for checkpoint in checkpoints[:-1]:
        resumed = train(str(folder / "model"), ckpt_path=checkpoint)
        assert resumed.trainer.global_step == module.trainer.global_step
        assert_same_bits(resumed.policy, module.policy)


@pytest.mark.slow
def test_dropout_is_on_in_these_runs(whole: Any) -> None:
    """Or the test above would show less than it seems to."""
    module, folder = whole
    without = train(str(folder / "model"), disable_dropout=True)
    assert not torch.equal(next(without.policy.parameters()), next(module.policy.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 7])
def test_a_killed_run_goes_on_from_its_last_checkpoint(whole: Any, tmp_path: Path, step: int) -> None:
    module, folder = whole
    model = str(folder / "model")
    options = {"folder": tmp_path, "every": 2, "kill_at": step}
    process = process_context().Process(target=train, args=(model,), kwargs=options)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    last = max(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    assert last.stem == f"step={step // 2 * 2}"
    assert_same_bits(train(model, ckpt_path=last).policy, module.policy)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_adapter_resumes(tmp_path: Path, workers: int) -> None:
    model = source(tmp_path / "model")
    options = {
        "lora": LoraSettings(r=2, dropout=0.1, target_modules=["c_attn"]),
        "data_options": {"num_workers": workers},
        "validate": False,
    }
    whole = train(model, folder=tmp_path, every=3, **options)
    checkpoint = tmp_path / "step=3.ckpt"
    keys = torch.load(checkpoint, weights_only=True)["state_dict"].keys()
    assert keys
    assert all("lora_" in key for key in keys)
    assert_same_bits(train(model, ckpt_path=checkpoint, **options).policy, whole.policy)


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["after the run", "at the end of the epoch"])
@pytest.mark.parametrize("step", [3, 5, 7])  # within the first epoch, at its end, within the second
def test_a_run_that_stopped_at_max_steps_goes_on(
    whole: Any, steady: Any, tmp_path: Path, step: int, saved: str
) -> None:
    model, expected, options = str(whole[1] / "model"), steady, STEADY
    assert expected.trainer.num_training_batches == 10
    saving = ModelCheckpoint(tmp_path, "run", save_on_train_epoch_end=True, enable_version_counter=False)
    limit = {"max_steps": step, "max_epochs": None, "enable_checkpointing": True}
    stopped = train(model, callbacks=[saving], trainer_options=limit, **options)
    assert stopped.trainer.global_step == step
    if saved == "after the run":
        stopped.trainer.save_checkpoint(tmp_path / "run.ckpt")
    for limit in ({"max_steps": 10, "max_epochs": None}, {"max_epochs": 2}):
        resumed = train(model, ckpt_path=tmp_path / "run.ckpt", trainer_options=limit, **options)
        assert resumed.trainer.global_step == 10
        assert_same_bits(resumed.policy, expected.policy)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_an_error_stopped_goes_on(whole: Any, tmp_path: Path, workers: int) -> None:
    """The batch that it failed in is trained on, and the number of workers may be another."""
    module, folder = whole
    model = str(folder / "model")

    class Fault(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("a fault")

    saving = OnExceptionCheckpoint(tmp_path, "run")
    with pytest.raises(RuntimeError, match="a fault"):
        train(
            model,
            callbacks=[Fault(), saving],
            trainer_options={"enable_checkpointing": True},
            data_options={"num_workers": workers},
        )
    resumed = train(model, ckpt_path=tmp_path / "run.ckpt", data_options={"num_workers": 2 - workers})
    assert_same_bits(resumed.policy, module.policy)


class Draws(pl.Callback):
    """What every generator gives in each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, float]] = []

    def on_before_backward(self, *_: Any) -> None:
        self.seen.append(draw())


def draw() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())


def test_chance_goes_on_as_in_the_run_that_stopped_whatever_the_seed(tmp_path: Path) -> None:
    """Each step of each epoch has chances of its own, of torch, of Python and of numpy."""
    path, draws = tmp_path / "run.ckpt", []
    for seed, epochs, checkpoint in ((5, 2, None), (5, 1, None), (6, 2, path)):
        module, data, seen = DPOModule(tiny_model(), optimizer=sgd), loader(), Draws()
        pl.seed_everything(seed, verbose=False)
        run = trainer(callbacks=[seen], max_epochs=epochs)
        run.fit(module, data, ckpt_path=checkpoint)
        if epochs == 1:
            run.save_checkpoint(path)
        draws.append(seen.seen)
    whole, first, resumed = draws
    assert [*first, *resumed] == whole
    for values in zip(*whole, strict=True):
        assert len(set(values)) == len(values) == 8


def test_ranks_have_chances_of_their_own() -> None:
    saved = {"seed": 1, "ranks": 2, "reference": None}
    draws = []
    for rank in (0, 1, 1):
        resuming: Any = ExactResume()
        resuming.load_state_dict(saved)
        place = SimpleNamespace(current_epoch=0, global_rank=rank)
        resuming.on_train_batch_start(place, None, None, 0)
        draws.append(draw())
    assert draws[1] == draws[2]
    assert all(one != other for one, other in zip(*draws[:2], strict=True))


def test_the_reference_must_be_the_same(tmp_path: Path) -> None:
    for name, seed in (("first", 1), ("second", 2)):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    options = {"optimizer": sgd, "startup_check": False}
    run = trainer(max_epochs=1)
    run.fit(DPOModule(tiny_model(), reference=first, **options), loader())
    run.save_checkpoint(tmp_path / "run.ckpt")

    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert all(key.startswith("policy.") for key in content["state_dict"])
    resumed = DPOModule(tiny_model(), reference=second, **options)
    before = {name: value.clone() for name, value in content["state_dict"].items()}
    with pytest.raises(ValueError, match="`reference` must be the one that the checkpoint"):
        trainer(max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "run.ckpt")
    torch.testing.assert_close(resumed.state_dict(), before, rtol=0, atol=0)
    trainer(max_epochs=2).fit(
        DPOModule(tiny_model(), reference=first, **options), loader(), ckpt_path=tmp_path / "run.ckpt"
    )


def test_a_copy_of_another_policy_is_another_reference(tmp_path: Path) -> None:
    run = trainer(max_epochs=1)
    run.fit(DPOModule(tiny_model(seed=1), optimizer=sgd), loader())
    run.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="`reference` must be the one"):
        trainer(max_epochs=2).fit(
            DPOModule(tiny_model(seed=2), optimizer=sgd), loader(), ckpt_path=tmp_path / "run.ckpt"
        )


def test_weights_are_told_apart() -> None:
    model = tiny_model()
    sums = weight_sums(model.named_parameters())
    assert same_weights(sums, weight_sums(tiny_model().named_parameters()))
    assert not same_weights(sums, weight_sums(tiny_model(seed=1).named_parameters()))
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-4
    assert not same_weights(sums, weight_sums(model.named_parameters()))
    assert same_weights("a", "a")
    assert not same_weights("a", "b")
    assert same_weights("a", sums)


@pytest.mark.parametrize(("saved", "ranks", "ready"), [(2, 1, 6), (1, 2, 1), (1, 4, 0), (4, 2, 6)])
def test_the_place_in_an_epoch_follows_the_number_of_ranks(saved: int, ranks: int, ready: int) -> None:
    counts = {"ready": 3, "started": 3, "processed": 3, "completed": 2}
    progress = {"current": dict(counts), "total": dict(counts)}
    rescale_progress(progress, saved=saved, ranks=ranks)
    expected = {"ready": ready, "started": ready, "processed": ready, "completed": ready - 1}
    assert progress == {"current": expected, "total": expected}
