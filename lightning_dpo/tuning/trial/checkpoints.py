"""A trial's checkpoints: policy weights at each report, and now and then all that a resumed run needs."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl

from lightning_dpo.files import write_file
from lightning_dpo.training.saving.background import BackgroundSaver
from lightning_dpo.tuning.storage import Storage

__all__ = [
    "CHECKPOINT",
    "CheckpointPlan",
    "CheckpointStore",
    "SavedFolder",
    "TrialCheckpoints",
    "read_pointer",
    "saved_report",
    "write_pointer",
]

CHECKPOINT = "trial.ckpt"
"""Name of Lightning's checkpoint in the folder of a report."""

PROGRESS = "progress.json"
"""Name of the file beside it with what was reported; it is written last: a folder without it is not whole."""

POINTER = "pointer.json"
"""Name of the file that Tune is given in place of a checkpoint, with the folder's name."""

_WEIGHTS, _STATE = ".weights", ".state"


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """When a trial keeps more than policy weights, and for how long.

    Attributes:
        full_state_every: Reports from one full state to the next; 0 keeps none.
        kept_states: Newest full states that stay: more than one where trials take over those of others.
        is_exchanged: Whether schedulers pause trials or hand their states on, so that a report may be the one
            that training goes on from: the last report of a trial has a full state too then.
    """

    full_state_every: int = 1
    kept_states: int = 1
    is_exchanged: bool = False

    def is_state(self, report: int, *, is_last: bool) -> bool:
        """Whether a report's checkpoint holds all that a resumed run needs.

        Args:
            report: Counts the reports of this start of the trial, from 1.
            is_last: Whether training ends with it.
        """
        every = self.full_state_every
        if every == 0 or report % every:
            return False
        return every == 1 or self.is_exchanged or not is_last


class SavedFolder(NamedTuple):
    """The folder of a checkpoint, by its place in a trial's own folder.

    Attributes:
        starts: How often the trial had been started.
        step: Optimizer steps.
        is_state: Whether it holds all that a resumed run needs, and not weights alone.
    """

    starts: int
    step: int
    is_state: bool

    @property
    def name(self) -> str:
        """Name of the folder."""
        return f"{self.starts}_{self.step:06d}{_STATE if self.is_state else _WEIGHTS}"

    @classmethod
    def parse(cls, name: str) -> SavedFolder | None:
        """Read a name; None for that of something else."""
        stem, dot, kind = name.rpartition(".")
        starts, _, step = stem.partition("_")
        if dot + kind not in (_WEIGHTS, _STATE) or not (starts.isdigit() and step.isdigit()):
            return None
        return cls(int(starts), int(step), dot + kind == _STATE)


class CheckpointStore:
    """The checkpoints of all trials of a sweep, each trial's in a folder of its own."""

    def __init__(self, storage: Storage) -> None:
        """Name the folder; nothing is read or written."""
        self._storage = storage

    def folder(self, trial: str) -> Storage:
        """Folder of a trial."""
        return self._storage / trial

    def location(self, trial: str, saved: SavedFolder) -> str:
        """Path of a checkpoint's folder, as its file system names it."""
        return str((self.folder(trial) / saved.name).path)

    def whole(self, trial: str) -> list[SavedFolder]:
        """The checkpoints of a trial that are whole, oldest first."""
        folder = self.folder(trial)
        found = (SavedFolder.parse(name) for name in folder.names(""))
        saved = [one for one in found if one is not None]
        return sorted(one for one in saved if (folder / one.name).read(PROGRESS) is not None)

    def newest_state(self, trial: str) -> SavedFolder | None:
        """The newest checkpoint that a trial can be resumed from."""
        return next((one for one in reversed(self.whole(trial)) if one.is_state), None)

    def remove_others(self, trial: str, kept: Sequence[SavedFolder]) -> None:
        """Remove all checkpoints of a trial but some, those that are not whole too."""
        folder = self.folder(trial)
        names = {one.name for one in kept}
        for name in folder.names(""):
            if SavedFolder.parse(name) is not None and name not in names:
                folder.remove((folder / name).path)

    @contextlib.contextmanager
    def opened(self, trial: str, saved: SavedFolder) -> Iterator[Path]:
        """A local folder with a checkpoint in it."""
        folder = self.folder(trial) / saved.name
        if folder.is_local:
            yield Path(folder.path)
            return
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch) / saved.name
            folder.fetch(folder.path, target)
            yield target


class TrialCheckpoints:
    """Writes the checkpoints of one trial, in the background where one process writes a file."""

    def __init__(self, store: CheckpointStore, trial: str, *, starts: int, plan: CheckpointPlan) -> None:
        """Say whose checkpoints, and when they hold more than weights.

        Args:
            store: Of the sweep.
            trial: The trial's name.
            starts: How often it was started, this time counted.
            plan: The sweep's.
        """
        self._store = store
        self._trial = trial
        self._starts = starts
        self._plan = plan
        self._saver = BackgroundSaver()
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._begun = 0
        self._newest: tuple[SavedFolder, SavedFolder | None] | None = None

    def save(
        self,
        trainer: pl.Trainer,
        report: Mapping[str, Any],
        *,
        is_last: bool,
        kept: SavedFolder | None = None,
    ) -> SavedFolder:
        """Begin to write the checkpoint of a report; every rank must call this.

        Args:
            trainer: Lightning's.
            report: What is reported; its step is the checkpoint's.
            is_last: Whether training ends with it.
            kept: The checkpoint of an earlier step that stays, where there is one; see `remove_older`.

        Raises:
            OSError: If this checkpoint or the one before cannot be written.
        """
        self._begun += 1
        self._starts = trainer.strategy.broadcast(self._starts)
        is_state = self._plan.is_state(self._begun, is_last=is_last)
        saved = SavedFolder(self._starts, int(report["step"]), is_state)
        target = self._store.folder(self._trial) / saved.name
        local = Path(target.path) if target.is_local else self._scratch_folder(trainer, saved)
        text = json.dumps(dict(report))
        is_first = trainer.is_global_zero
        one_file = not getattr(trainer.strategy, "_saves_folders", False)

        def upload() -> None:
            if not target.is_local:
                target.add(local)
                shutil.rmtree(local, ignore_errors=True)

        def finish() -> None:
            if is_first:
                if target.is_local:
                    write_file(local / PROGRESS, text)
                else:
                    target.write(PROGRESS, text)

        def uploaded_and_finished() -> None:
            if is_first:
                upload()
                finish()

        then = uploaded_and_finished if one_file else None
        self._saver.save(trainer, local / CHECKPOINT, weights_only=not is_state, then=then)
        if not one_file:
            if trainer.local_rank == 0:
                upload()
            trainer.strategy.barrier("all parts of a checkpoint are stored")
            finish()
        self._newest = (saved, kept) if is_first else None
        return saved

    def remove_older(self) -> None:
        """Remove what the newest checkpoint replaces: not full states that stay, nor that of the best step.

        Not before its report is sent: until then the trial's record names the one before.
        """
        if self._newest is None:
            return
        newest, kept = self._newest
        states = [one for one in self._store.whole(self._trial) if one.is_state]
        wanted = [newest, *states[max(len(states) - self._plan.kept_states, 0) :]]
        self._store.remove_others(self._trial, [*wanted, *([kept] if kept is not None else [])])

    @property
    def is_done(self) -> bool:
        """Whether nothing is being written on this rank."""
        return self._saver.is_done

    def wait(self) -> None:
        """Return when the checkpoint that was begun is whole.

        Raises:
            OSError: If it could not be written.
        """
        self._saver.wait()

    def close(self) -> None:
        """Wait, and let go of what writing needs; raises what `wait` does."""
        try:
            self._saver.close()
        finally:
            if self._scratch is not None:
                self._scratch.cleanup()
                self._scratch = None

    def _scratch_folder(self, trainer: pl.Trainer, saved: SavedFolder) -> Path:
        """A local folder for a checkpoint that is then stored elsewhere, the same on all ranks."""
        self._scratch = self._scratch or tempfile.TemporaryDirectory()
        return Path(trainer.strategy.broadcast(self._scratch.name)) / saved.name


def saved_report(folder: Path) -> dict[str, Any]:
    """What was reported with a checkpoint.

    Args:
        folder: Folder of the checkpoint.
    """
    report: dict[str, Any] = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    return report


def write_pointer(folder: Path, trial: str, saved: SavedFolder) -> None:
    """Write what Tune keeps, and hands on between trials, in place of a checkpoint."""
    write_file(folder / POINTER, json.dumps({"trial": trial, "folder": saved.name}))


def read_pointer(folder: Path) -> tuple[str, SavedFolder] | None:
    """Which trial's which checkpoint; None where Tune holds the checkpoint itself, as in older sweeps."""
    if not (folder / POINTER).is_file():
        return None
    fields = json.loads((folder / POINTER).read_text(encoding="utf-8"))
    saved = SavedFolder.parse(fields["folder"])
    assert saved is not None
    return fields["trial"], saved
