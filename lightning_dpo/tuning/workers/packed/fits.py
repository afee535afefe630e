"""The training runs of one process: they take turns, and share what lies in memory of their base model."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_dpo.models.shared_base import sharing_bases
from lightning_dpo.tuning.trial.ending import report_again
from lightning_dpo.tuning.trial.one_process import run_in_one_process
from lightning_dpo.tuning.trial.spec import TrialSpec
from lightning_dpo.tuning.trial.status import StoppedError
from lightning_dpo.tuning.workers.mailbox import Event
from lightning_dpo.tuning.workers.packed.baton import Baton
from lightning_dpo.tuning.workers.packed.seat import Seat, TakeTurns

__all__ = ["PackedFits", "SharedDeviceStrategy"]


class SharedDeviceStrategy(SingleDeviceStrategy):
    """One device for several training runs: where one ends, the weights that others use stay there."""

    def teardown(self) -> None:
        """Tear down, without Lightning's move of the module to the CPU."""
        module, self._lightning_module = self._lightning_module, None
        try:
            super().teardown()
        finally:
            self._lightning_module = module


class PackedFits:
    """Runs trials in threads of this process, which is theirs alone: nothing of it is given back."""

    def __init__(self) -> None:
        """Begin with none."""
        self._baton = Baton()
        self._forever = ExitStack()
        self._bases = self._forever.enter_context(sharing_bases())
        self._is_at_home = False
        self._running: dict[str, tuple[Seat, threading.Thread]] = {}
        self._lock = threading.Lock()

    @property
    def loads(self) -> int:
        """Base models that were loaded."""
        return self._bases.loads

    def begin(self, spec: TrialSpec, trial: str, config: Mapping[str, Any], given: Any) -> None:
        """Start a trial; where it runs already, because its process at Tune's died, that run ends first.

        Args:
            spec: What the sweep's trials have in common.
            trial: Its name.
            config: What Ray chose.
            given: The checkpoint that Tune has for it.
        """
        if trial in self._running:
            seat, thread = self._running[trial]
            seat.stop()
            thread.join()
        with self._lock:
            if not self._is_at_home:
                # For good: a trial that changes the folder and back would do so in the middle of another one.
                self._forever.enter_context(spec.user_environment())
                self._is_at_home = True
        seat = Seat(self._baton, given)
        thread = threading.Thread(
            target=self._run, args=(spec, trial, dict(config), seat), daemon=True, name=trial
        )
        self._running[trial] = seat, thread
        thread.start()

    def seat(self, trial: str) -> Seat:
        """The place of a trial that was begun."""
        return self._running[trial][0]

    def _run(self, spec: TrialSpec, trial: str, config: dict[str, Any], seat: Seat) -> None:
        try:
            with self._baton.held():
                self._train(spec, trial, config, seat)
        except StoppedError:
            return
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
            seat.end(Event("failed", error=f"{text}\n{type(error).__name__}: {error}"))
            return
        seat.end(Event("done"))

    def _train(self, spec: TrialSpec, trial: str, config: dict[str, Any], seat: Seat) -> None:
        record = spec.record(trial, config)
        if record.status.is_over:
            report_again(spec.objective, record, session=seat)
            return
        device = torch.device("cuda", 0) if spec.resources.gpus else torch.device("cpu")
        run_in_one_process(
            spec,
            record,
            session=seat,
            callbacks=[TakeTurns(seat)],
            trainer_options={"strategy": SharedDeviceStrategy(device)},
        )
