"""Training runs that take turns in one process, without Ray."""

from __future__ import annotations

import os
import random
import threading
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import trainer

from lightning_dpo.tuning.trial.status import StoppedError
from lightning_dpo.tuning.workers.packed.baton import Baton
from lightning_dpo.tuning.workers.packed.seat import Seat, TakeTurns


class ByChance(pl.LightningModule):
    """Every generator decides on what it learns, and in which order the data come."""

    def __init__(self, log: list[Any]) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.log_of_steps = log

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log_of_steps.append(threading.current_thread().name)
        return (self.layer(batch).mean() - random.random() * float(np.random.rand())) ** 2

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.layer(batch).mean() * random.random())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _fit(seed: int, log: list[Any], callbacks: list[pl.Callback]) -> list[Tensor]:
    seed_everything(seed)
    module = ByChance(log)
    rows = torch.arange(32.0).reshape(8, 4) / 32
    trainer(max_epochs=2, callbacks=callbacks, num_sanity_val_steps=0).fit(
        module, DataLoader(rows, batch_size=1, shuffle=True), DataLoader(rows, batch_size=4)
    )
    assert os.environ["PL_GLOBAL_SEED"] == str(seed)
    return [p.detach().clone() for p in module.parameters()]


def test_runs_that_take_turns_end_as_they_do_alone() -> None:
    seeds, alone, together, log = (1, 2, 3), {}, {}, []
    for seed in seeds:
        alone[seed] = _fit(seed, [], [])
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
    baton = Baton()

    def run(seed: int) -> None:
        with baton.held():
            assert "PL_GLOBAL_SEED" not in os.environ
            seat = Seat(baton)
            seat.answer()
            together[seed] = _fit(seed, log, [TakeTurns(seat)])
            seat.report({"seed": seed})

    threads = [threading.Thread(target=run, args=(seed,), name=str(seed)) for seed in seeds]
    with baton.held():  # all of them wait before one begins
        for thread in threads:
            thread.start()
        while len(baton._line) <= len(seeds):
            pass
    for thread in threads:
        thread.join(60)
    assert set(log[:9]) == {"1", "2", "3"}
    assert all(log[i : i + 3] == ["1", "2", "3"] for i in range(0, 12, 3)), log
    for seed in seeds:
        for ours, theirs in zip(together[seed], alone[seed], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_trial_leaves_where_it_is_stopped_and_waits_without_the_baton() -> None:
    baton = Baton()
    seat, ended = Seat(baton), []

    def run() -> None:
        with baton.held():
            try:
                seat.report({"step": 1})
                while True:
                    seat.take_turns()
            except StoppedError:
                ended.append(torch.rand(1))

    thread = threading.Thread(target=run)
    thread.start()
    event = seat.next_event(10)
    assert event is not None
    assert (event.kind, event.metrics) == ("report", {"step": 1})
    with baton.held():  # it waits for an answer, and others go on
        seat.answer()
    assert seat.next_event(0.01) is None
    seat.stop()
    thread.join(10)
    assert len(ended) == 1
    with baton.held():
        pass


def test_a_trial_whose_process_at_tune_is_silent_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    seat = Seat(Baton())
    monkeypatch.setattr("lightning_dpo.tuning.workers.packed.seat._SILENCE_S", -1.0)
    with pytest.raises(StoppedError):
        seat.take_turns()
