"""Where the seconds of a sweep go: marks that its processes leave, and the phases between them.

A mark says which phase begins. The process of a trial and the one that drives the sweep leave them in files
of their own; laid into one order they fill the time from a worker's start to its last trial's end.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
from ray import tune

__all__ = ["SWEEP_PHASES", "TRIAL_PHASES", "DriverMarks", "Timeline", "mark", "phases"]

TRIAL_PHASES = (
    "process and imports",
    "start of a trial",
    "data",
    "model",
    "reference",
    "steps",
    "validation",
    "checkpoint and report",
    "end of a trial",
    "between trials",
)
"""Of the processes of trials. "start" is from Tune's word to the first of the trial's own marks, with us the
reading of the recipe too; "end" from its last mark to Tune's word."""

SWEEP_PHASES = ("start and imports", "Ray starts", "preparation", "trials", "end")
"""Of the process that drives the sweep."""

_BEGAN = SWEEP_PHASES[0]


def mark(folder: str | Path, phase: str, *, trial: str = "") -> None:
    """Say that a phase of this process begins now; its first mark also says when the process began."""
    path = Path(folder, f"{os.getpid()}.marks")
    began = [] if path.exists() else [(psutil.Process().create_time(), "", _BEGAN)]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in (*began, (time.time(), trial, phase)))


def trial_name() -> str:
    """The trial of this process; empty outside of trials."""
    return tune.get_context().get_trial_id() or ""


class DriverMarks(tune.Callback):
    """Marks what Tune does with trials."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def setup(self, *_: Any, **__: Any) -> None:
        mark(self._folder, "trials")

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        mark(self._folder, "start of a trial", trial=trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        mark(self._folder, "between trials", trial=trial.trial_id)


class Timeline(pl.Callback):
    """Marks the phases of training with Lightning. It is the first callback: what others do is in a phase."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._mark("data")

    def _mark(self, phase: str) -> None:
        mark(self._folder, phase, trial=trial_name())

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._mark("model")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark("steps")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark("validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark("checkpoint and report")

    def on_train_batch_start(self, *_: Any) -> None:
        self._mark("steps")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark("checkpoint and report")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._mark("end of a trial")


def phases(folder: str | Path) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a sweep that this process has driven.

    Returns:
        Mean seconds of each phase of a trial, and seconds of each phase of the sweep.
    """
    files = {int(path.stem): _read(path) for path in Path(folder).glob("*.marks")}
    driver = files.pop(os.getpid())
    told = [entry for entry in driver if entry[1]]
    # What trials share is prepared outside of any: here, or by processes that may run trials later.
    sweep = [
        (when, phase if phase in SWEEP_PHASES else "preparation")
        for when, trial, phase in driver
        if not trial
    ]
    sweep.append((max(when for when, _, phase in told if phase == "between trials"), "end"))
    begins = next(when for when, phase in sweep if phase == "trials")
    spent: defaultdict[str, float] = defaultdict(float)
    for (began, _, _), *entries in files.values():
        sweep += [(when, "preparation") for when, trial, _ in entries if not trial and when < begins]
        own = {trial for _, trial, _ in entries if trial}
        lane = [(when, phase) for when, trial, phase in (*entries, *told) if trial in own]
        for phase, seconds in _between([(max(began, begins), TRIAL_PHASES[0]), *lane]).items():
            spent[phase] += seconds
    trials = len({trial for _, trial, _ in told})
    whole = _between([*sweep, (time.time(), "")])
    return {name: spent[name] / trials for name in TRIAL_PHASES}, {
        name: whole.get(name, 0.0) for name in SWEEP_PHASES
    }


def _read(path: Path) -> list[tuple[float, str, str]]:
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()]  # type: ignore[misc]


def _between(marks: list[tuple[float, str]]) -> dict[str, float]:
    """Seconds from each mark to the next one, added up by phase; the last mark ends the one before."""
    spent: defaultdict[str, float] = defaultdict(float)
    ordered = sorted(marks)
    for (when, phase), (ends, _) in pairwise(ordered):
        spent[phase] += ends - when
    return dict(spent)
