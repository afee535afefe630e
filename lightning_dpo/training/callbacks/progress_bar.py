"""A progress bar whose line fits in a terminal of 80 columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console
from rich.progress import BarColumn, ProgressColumn, Task, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

__all__ = ["ShortProgressBar", "short_values"]

_NAMES = {
    "loss": "loss",
    "rewards/margin": "margin",
    "rewards/accuracy": "acc",
    "rollout/score": "score",
    "rollout/kl": "KL",
    "kl": "KL",
    "tokens_per_second": "tok/s",
}
"""Short names in the order they are shown; anything else keeps the last word of its name."""

_FINE = ("loss", "rewards/margin")
"""What has a third decimal where there is room."""

_WIDTH_WITH_A_BAR = 110
"""Columns of a terminal that has room for a bar beside the numbers."""

_BAR = 20
_TIME = len(" 01:20")
_MARGIN = 2
"""Columns of Lightning's own column of values, which stays empty."""


class ShortProgressBar(RichProgressBar):
    """One line of short names, such as ``fit 40/90 01:20 loss 0.671/0.689 margin 0.043 acc 0.75/0.50``.

    Of two numbers the first is training's and the second the last validation's; what only validation logs is
    "val ...". Loggers still get the full names. The command line shows this bar; in a script of your own pass
    it as a callback: ``Trainer(callbacks=[ShortProgressBar()])``.
    """

    def __init__(self, **kwargs: Any) -> None:
        """Prepare an empty line.

        Args:
            kwargs: For RichProgressBar.
        """
        super().__init__(**kwargs)
        self._line = _Line()

    @property
    def sanity_check_description(self) -> str:
        """What the line of the validation before training begins with."""
        return "val"

    @property
    def validation_description(self) -> str:
        """What a line of validation begins with."""
        return "val"

    def configure_columns(self, trainer: pl.Trainer) -> list[ProgressColumn]:
        """Stage, batches, remaining time and values; a bar only in a wide terminal."""
        return [
            _StageColumn(trainer),
            *([BarColumn(bar_width=_BAR)] if _has_bar() else []),
            _BatchesColumn(self._line),
            _ValuesColumn(self._line),
        ]

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Put the metrics into this bar's own column; none are left for Lightning's, which would wrap."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        batches = _count(self.total_train_batches)
        room = get_console().width - len(f"{_stage(trainer)} {batches}/{batches} ") - _MARGIN
        room -= (_BAR + 1) * _has_bar()
        for fine, timed in ((True, True), (False, True), (True, False), (False, False)):
            text = short_values(metrics, fine=fine)
            if len(text) + _TIME * timed <= room:
                break
        self._line.task, self._line.text, self._line.timed = self.train_progress_bar_id, text, timed
        return {}


def short_values(metrics: dict[str, Any], *, fine: bool = True) -> str:
    """Write metrics with short names.

    Args:
        metrics: Values by logged name; "train/loss" and "val/loss" become one entry.
        fine: Give loss and margin, which move by thousandths at the start, a third decimal.
    """
    entries: dict[str, dict[str, str]] = {name: {} for name in _NAMES}
    for name, value in metrics.items():
        stage, _, rest = name.partition("/")
        if stage not in ("train", "val"):
            stage, rest = "", name
        entries.setdefault(rest, {})[stage] = _number(value, fine=fine and rest in _FINE)
    return " ".join(_entry(name, values) for name, values in entries.items() if values)


def _entry(name: str, values: dict[str, str]) -> str:
    short = _NAMES.get(name) or name.rpartition("/")[2]
    only_validated = list(values) == ["val"] and name != "kl"  # there is no KL of training to tell it from
    return f"{'val ' if only_validated else ''}{short} {'/'.join(values.values())}"


def _number(value: Any, *, fine: bool) -> str:
    """Four characters or so, whatever the size; one more if `fine`."""
    if isinstance(value, str):
        return value
    size = abs(value)
    if size < 10 or math.isnan(value):
        return f"{value:.{3 if fine and size < 1 else 2}f}"
    if size < 1000:
        return f"{value:.{1 if size < 100 else 0}f}"
    return f"{value / 1000:.1f}k" if size < 10_000 else f"{value / 1000:.0f}k"


def _has_bar() -> bool:
    return get_console().width >= _WIDTH_WITH_A_BAR


def _stage(trainer: pl.Trainer) -> str:
    """What runs while training: the epoch, if there are several."""
    epochs, epoch = trainer.max_epochs, trainer.current_epoch + 1
    if epochs == 1:
        return "fit"
    if epochs is None or epochs < 0:
        return f"epoch {epoch}"
    return f"epoch {min(epoch, epochs)}/{epochs}"  # after the last one the trainer counts on


def _count(batches: float | None) -> str:
    return "--" if batches is None or math.isinf(batches) else str(int(batches))


@dataclass
class _Line:
    """What the columns of training show.

    Attributes:
        task: The line of training among those of the bar.
        text: Its values.
        timed: Whether there is room for the time.
    """

    task: int | None = None
    text: str = ""
    timed: bool = True


class _StageColumn(ProgressColumn):
    """What runs."""

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._trainer = trainer

    def render(self, task: Task) -> Text:
        return Text(_stage(self._trainer) if task.description.startswith("Epoch") else task.description)


class _BatchesColumn(TimeRemainingColumn):
    """Batches, and the time that remains, then the time it took."""

    def __init__(self, line: _Line) -> None:
        super().__init__(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True))
        self._line = line

    def render(self, task: Task) -> Text:
        batches = Text(f"{int(task.completed)}/{_count(task.total)}")
        return batches + " " + super().render(task) if self._line.timed else batches


class _ValuesColumn(ProgressColumn):
    """The values of training; in a narrow terminal this column alone is cut."""

    def __init__(self, line: _Line) -> None:
        super().__init__()
        self._line = line

    def render(self, task: Task) -> Text:
        return Text(self._line.text if task.id == self._line.task else "", no_wrap=True, overflow="ellipsis")
