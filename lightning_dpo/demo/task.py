"""The embedded task on disk: a model folder, training and validation pairs, prepared once and reused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_dpo.demo.context import single_thread
from lightning_dpo.demo.model import build_model, build_tokenizer, fit_model
from lightning_dpo.demo.pairs import LabelledPair, bayes_accuracy, sample_pairs
from lightning_dpo.files import discard, put_in_place, scratch_name

__all__ = ["Task", "TaskConfig", "load_pairs", "prepare_task"]

_FORMAT = 1
"""Version of the folder, raised when the same parameters come to give another task."""

_RECORD = "task.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """What decides a task.

    Attributes:
        hidden_size: Width of the decoder, a multiple of 8.
        layers: Depth of the decoder.
        fit_steps: Steps of maximum likelihood on the grammar.
        fit_batch_size: Reviews of a fitting step.
        fit_lr: Highest learning rate of the fit.
        train_pairs: Pairs to train on.
        validation_pairs: Pairs held out.
        label_scale: Reward per star in the Bradley-Terry labels; the higher, the less noise.
        seed: Seeds weights, reviews and pairs.
    """

    hidden_size: int = 96
    layers: int = 2
    fit_steps: int = 500
    fit_batch_size: int = 32
    fit_lr: float = 6e-3
    train_pairs: int = 2048
    validation_pairs: int = 512
    label_scale: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: If a value is out of its range.
        """
        for name in ("layers", "fit_steps", "fit_batch_size", "train_pairs", "validation_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.hidden_size < 8 or self.hidden_size % 8:
            raise ValueError(f"`hidden_size` must be a positive multiple of 8, got {self.hidden_size}")
        for name in ("fit_lr", "label_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Task:
    """A prepared task.

    Attributes:
        folder: Where the task lies.
        config: What the task was made from.
        fit_loss: Loss of the fitted model at the end, nats per token.
        bayes_accuracy: The most accuracy that can be expected on the validation pairs, given their noise.
    """

    folder: Path
    config: TaskConfig
    fit_loss: float
    bayes_accuracy: float

    @property
    def model(self) -> Path:
        """Folder of the fitted model and its tokenizer, for `from_pretrained`."""
        return self.folder / "model"

    @property
    def train(self) -> Path:
        """Training pairs: JSON lines with prompt, chosen and rejected."""
        return self.folder / "train.jsonl"

    @property
    def validation(self) -> Path:
        """Held-out pairs: JSON lines with prompt, chosen and rejected."""
        return self.folder / "validation.jsonl"


def prepare_task(folder: str | Path, *, config: TaskConfig | None = None, progress: bool = True) -> Task:
    """Make the task, or reuse the one in the folder if it was made from the same parameters.

    A task made from other parameters is replaced. The folder appears whole or not at all, also where
    several processes prepare it at once.

    Args:
        folder: The task's place: missing, empty, or an earlier task.
        config: What decides the task; the defaults take about 20 s on two cores.
        progress: Show a progress bar.

    Raises:
        ValueError: If the folder holds something else.
    """
    target = Path(folder).expanduser()
    wanted = config or TaskConfig()
    found = _find(target, wanted)
    if found is not None:
        return found
    if not _is_replaceable(target):
        raise ValueError(f"`folder` must be missing, empty or an earlier task, got {str(folder)!r}")
    scratch = target.with_name(scratch_name(target.name))
    try:
        with single_thread():
            _make(scratch, wanted, progress=progress)
        if _find(target, wanted) is None:
            put_in_place(scratch, target)
    except OSError:
        # Another process was first with the same task, which is then as good as this one.
        if _find(target, wanted) is None:
            raise
    finally:
        discard(scratch)
    task = _find(target, wanted)
    assert task is not None
    return task


def load_pairs(path: str | Path) -> list[LabelledPair]:
    """Read pairs that `prepare_task` wrote."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [LabelledPair(**json.loads(line)) for line in lines]


def _make(folder: Path, config: TaskConfig, *, progress: bool) -> None:
    """Fit the model, sample the pairs and write both into a folder."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, hidden_size=config.hidden_size, layers=config.layers, seed=config.seed)
    fit_loss = fit_model(
        model,
        tokenizer=tokenizer,
        steps=config.fit_steps,
        batch_size=config.fit_batch_size,
        lr=config.fit_lr,
        seed=config.seed,
        progress=progress,
    )
    count = config.train_pairs + config.validation_pairs
    pairs = sample_pairs(model, tokenizer=tokenizer, count=count, scale=config.label_scale, seed=config.seed)
    train, validation = pairs[: config.train_pairs], pairs[config.train_pairs :]
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    _write_pairs(folder / "train.jsonl", train)
    _write_pairs(folder / "validation.jsonl", validation)
    record = {
        "format": _FORMAT,
        "config": asdict(config),
        "fit_loss": fit_loss,
        "bayes_accuracy": bayes_accuracy(validation, scale=config.label_scale),
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _find(folder: Path, config: TaskConfig) -> Task | None:
    """The task in a folder, or None where there is none that this version made from these parameters."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    if record.get("format") != _FORMAT or record["config"] != asdict(config):
        return None
    return Task(folder, config, record["fit_loss"], record["bayes_accuracy"])


def _is_replaceable(folder: Path) -> bool:
    """Whether nothing of value to others is lost with a folder."""
    if not folder.exists():
        return True
    return folder.is_dir() and ((folder / _RECORD).is_file() or not any(folder.iterdir()))


def _write_pairs(path: Path, pairs: Sequence[LabelledPair]) -> None:
    lines = (json.dumps(pair._asdict(), ensure_ascii=False) for pair in pairs)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
