from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tiny_models import random_pairs, tiny_model
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from training import History, loader, sgd, trainer

from lightning_dpo import DPOModule, PairBatch
from lightning_dpo.losses import SimPOLoss
from lightning_dpo.training.callbacks import throughput


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "_clock", clock)
    return clock


class Timed(DPOModule):
    """Takes a second a step, and ten for each validation batch."""

    clock: Clock

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        self.clock.now += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        self.clock.now += 10
        super().validation_step(batch, batch_idx)


class Slow(DataLoader):
    """Takes so many seconds for each batch."""

    clock: Clock
    seconds: float

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.clock.now += self.seconds
            yield batch


def module(clock: Clock) -> Timed:
    made = Timed(tiny_model(), reference="none", loss=SimPOLoss(beta=2.0), optimizer=sgd)
    made.clock = clock
    return made


def slow(clock: Clock, seconds: float, *, count: int = 48, dataset: Any = None) -> Slow:
    rows = random_pairs(count) if dataset is None else dataset
    made = Slow(rows, batch_size=2, collate_fn=PairBatch.from_pairs)
    made.clock, made.seconds = clock, seconds
    return made


@pytest.mark.parametrize(("seconds", "share"), [(3.0, 0.75), (0.0, 0.0), (0.25, 0.2)])
def test_the_share_of_time_that_training_waits_for_data(clock: Clock, seconds: float, share: float) -> None:
    history = History()
    trainer(callbacks=[history]).fit(module(clock), slow(clock, seconds))
    assert history.values["train/data_wait"] == pytest.approx([share] * 23)
    tokens = history.values["train/tokens_per_second"]
    assert all(value > 0 for value in tokens)


def test_time_before_training_and_of_validation_is_not_of_the_share(clock: Clock) -> None:
    history = History()
    runner = trainer(callbacks=[history], max_epochs=2, val_check_interval=4)
    made = module(clock)
    runner.fit(made, slow(clock, 1.0), loader(count=8))
    assert history.values["train/data_wait"] == pytest.approx([0.5] * 47)
    runner.fit_loop.max_epochs = 3  # the same trainer again, which is told once of each batch all the same
    runner.fit(made, slow(clock, 1.0))
    assert history.values["train/data_wait"] == pytest.approx([0.5] * 70)


def test_a_loader_that_gets_slow_is_seen(clock: Clock) -> None:
    history = History()
    batches = slow(clock, 0.0)

    class Slower(History):
        def on_train_batch_end(self, runner: Any, *arguments: Any) -> None:
            batches.seconds = 4.0 if runner.global_step >= 10 else 0.0

    trainer(callbacks=[history, Slower()]).fit(module(clock), batches)
    shares = history.values["train/data_wait"]
    # Each is over the ten batches before it.
    assert shares[9:19] == pytest.approx([0.0] * 10)  # the first batch's is seen with the second
    assert shares[19:] == pytest.approx([0.8] * 4)


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(random_pairs(48))


def test_a_loader_without_a_length_is_seen_too(clock: Clock) -> None:
    history = History()
    trainer(callbacks=[history], max_steps=20).fit(module(clock), slow(clock, 3.0, dataset=Endless()))
    assert history.values["train/data_wait"][9:] == pytest.approx([0.75] * 10)
