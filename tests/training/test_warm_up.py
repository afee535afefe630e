"""The default warm-up of runs that time or a hand ends, and of data without a length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
from tiny_models import random_pairs, tiny_model
from torch.utils.data import DataLoader, IterableDataset
from training import History, loader, sgd, trainer

from lightning_dpo import DPOModule, PairBatch

ENDLESS = {"max_epochs": -1, "max_time": {"hours": 1}}


class StopAfter(pl.Callback):
    """Ends a run as its user does."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[PairBatch]:
        for seed in range(6):
            yield PairBatch.from_pairs(random_pairs(2, seed=seed))


def rates(data: DataLoader, *, steps: int = 6, **options: Any) -> list[float]:
    """The learning rate of each batch, as a share of the full one."""
    module_options = {"warmup_ratio": options.pop("warmup_ratio", 0.5)}
    history = History()
    run = trainer(callbacks=[history, StopAfter(steps)], min_epochs=0, **options)
    run.fit(DPOModule(tiny_model(), optimizer=sgd, **module_options), data)
    return [rate / 0.5 for rate in history.values["train/lr"]]


@pytest.mark.parametrize("endless", [ENDLESS, {"max_epochs": -1}], ids=["time", "no limit"])
def test_a_run_without_an_end_warms_up_over_a_share_of_an_epoch(
    endless: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        found = rates(loader(count=16), **endless)
    assert found == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])  # two of four steps
    said = [line for line in caplog.messages if "the warm-up takes its share of one epoch's, 4 steps" in line]
    assert len(said) == 1


def test_accumulated_batches_are_one_step_of_the_epoch() -> None:
    found = rates(loader(count=16), steps=3, warmup_ratio=1.0, accumulate_grad_batches=2, **ENDLESS)
    assert sorted(set(found)) == pytest.approx([1 / 3, 2 / 3, 1])


def test_the_steps_of_a_run_that_has_an_end_are_taken_where_there_are_some() -> None:
    found = rates(loader(count=16), max_steps=2, **{**ENDLESS, "warmup_ratio": 1.0})
    assert found == pytest.approx([1 / 3, 2 / 3])


def test_without_a_warm_up_no_length_is_asked_for() -> None:
    data = DataLoader(Stream(), batch_size=None)
    assert rates(data, steps=3, warmup_ratio=0.0, **ENDLESS) == pytest.approx([1.0] * 3)


def test_data_without_a_length_need_an_end() -> None:
    with pytest.raises(ValueError, match="`max_steps` or `max_epochs` must say how long the run is"):
        rates(DataLoader(Stream(), batch_size=None), **ENDLESS)


def test_epochs_of_a_stream_have_no_warm_up_and_say_so() -> None:
    data = DataLoader(Stream(), batch_size=None)
    with pytest.warns(UserWarning, match="the data have no length, so that there is no warm-up"):
        assert rates(data, warmup_ratio=1.0, max_epochs=1) == pytest.approx([1.0] * 6)
