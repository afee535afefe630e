"""The whole demonstration: prepare the task, align the small decoder with DPO, and show what changed."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_dpo.data.datamodule import PreferenceDataModule
from lightning_dpo.demo.context import quiet, single_thread
from lightning_dpo.demo.measure import Agreement, Measurement, agreement, best_reachable, measure
from lightning_dpo.demo.report import show
from lightning_dpo.demo.task import Task, TaskConfig, load_pairs, prepare_task
from lightning_dpo.evaluation.frontier import FrontierPoint
from lightning_dpo.losses import DPOLoss
from lightning_dpo.models.load import load_model, load_tokenizer
from lightning_dpo.training.dpo import DPOModule

__all__ = ["Clock", "DemoResult", "evaluate", "run_demo"]

_MAX_LENGTH = 128


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demonstration found.

    Attributes:
        task: The prepared task.
        policy: Folder of the aligned model and its tokenizer, for `from_pretrained`.
        before: Reviews of the reference.
        after: Reviews of the policy.
        agreement: Of the policy's implied rewards with held-out labels and true scores.
        validation_accuracy: The accuracy that the trainer logged; it equals `agreement.accuracy`.
        best: The best mean score that any policy has at this KL; its reward is in stars.
        seconds: Wall time of each stage.
    """

    task: Task
    policy: Path
    before: Measurement
    after: Measurement
    agreement: Agreement
    validation_accuracy: float
    best: FrontierPoint
    seconds: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""
        return {
            "score": {"before": self.before.score._asdict(), "after": self.after.score._asdict()},
            "kl": self.after.kl._asdict(),
            "accuracy": self.agreement.accuracy,
            "bayes_accuracy": self.task.bayes_accuracy,
            "reward_correlation": self.agreement.correlation,
            "grammatical": {"before": self.before.grammatical, "after": self.after.grammatical},
            "best_at_kl": asdict(self.best),
            "seconds": self.seconds,
        }


@quiet()
@single_thread()
def run_demo(
    *,
    output: str | Path = Path("outputs/demo"),
    beta: float = 0.1,
    lr: float = 0.02,
    epochs: int = 2,
    batch_size: int = 64,
    samples_per_prompt: int = 256,
    seed: int = 0,
    task: TaskConfig | None = None,
    verbose: bool = True,
) -> DemoResult:
    """Run the demonstration: about a minute on two cores, less where the task is prepared already.

    Plain SGD with momentum trains the policy. A step of Adam is as long for a weight whose gradient is noise
    as for one that carries the preference; at this size that wears the grammar down.

    Args:
        output: Folder for the task, the aligned model (`policy`) and the figures (`result.json`).
        beta: Strength of the pull towards the reference.
        lr: Learning rate.
        epochs: Passes over the training pairs.
        batch_size: Pairs of a step.
        samples_per_prompt: Reviews of each prompt that the evaluation samples from each model.
        seed: Of everything, unless `task` brings its own.
        task: Parameters of the task.
        verbose: Show progress bars and print the table.
    """
    root = Path(output).expanduser()
    clock = Clock()
    say: Callable[[str], None] = print if verbose else _silent
    progress = verbose and sys.stdout.isatty()
    say("fitting a small decoder to the grammar and sampling pairs from it, unless that was done before ...")
    made = prepare_task(root / "task", config=task or TaskConfig(seed=seed), progress=progress)
    clock.lap("prepare")
    say("training with DPO ...")
    module = DPOModule(
        str(made.model),
        loss=DPOLoss(beta=beta),
        optimizer=lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9),
    )
    data = PreferenceDataModule(
        str(made.train),
        validation=str(made.validation),
        tokenizer=str(made.model),
        max_length=_MAX_LENGTH,
        batch_size=batch_size,
        cache_dir=str(root / "cache"),
        num_processes=1,
        seed=seed,
    )
    accuracy = _fit(module, data, epochs=epochs, progress=progress)
    clock.lap("train")
    say("sampling reviews before and after ...")
    policy_folder = _export(module, root / "policy")
    result = evaluate(
        made, policy_folder, accuracy=accuracy, samples_per_prompt=samples_per_prompt, seed=seed, clock=clock
    )
    if verbose:
        show(result, beta=beta)
    return result


@single_thread()
def evaluate(
    made: Task,
    policy_folder: Path,
    *,
    accuracy: float,
    samples_per_prompt: int = 256,
    seed: int = 0,
    clock: Clock | None = None,
) -> DemoResult:
    """Sample from an aligned model and from the one it started from, and write the figures beside the task.

    Args:
        made: The task.
        policy_folder: The aligned model.
        accuracy: What the trainer logged at the end.
        samples_per_prompt: Reviews of each prompt from each model.
        seed: Of the samples.
        clock: Has measured the stages before.
    """
    clock = clock or Clock()
    policy, reference = load_model(str(policy_folder)), load_model(str(made.model))
    tokenizer = load_tokenizer(str(made.model))
    sample = partial(
        measure,
        policy,
        reference=reference,
        tokenizer=tokenizer,
        samples_per_prompt=samples_per_prompt,
        seed=seed,
    )
    before, after = sample(sample_from="reference"), sample()
    held_out = load_pairs(made.validation)
    agreed = agreement(policy, reference=reference, tokenizer=tokenizer, pairs=held_out)
    best = best_reachable(before, after)
    clock.lap("evaluate")
    result = DemoResult(made, policy_folder, before, after, agreed, accuracy, best, clock.laps)
    _write(made.folder.parent / "result.json", result)
    return result


def _fit(module: DPOModule, data: PreferenceDataModule, *, epochs: int, progress: bool) -> float:
    """Train, and return the validation accuracy at the end."""
    with quiet():
        trainer = pl.Trainer(
            max_epochs=epochs,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
        )
        trainer.fit(module, data)
    return float(trainer.callback_metrics["val/rewards/accuracy"])


def _silent(_: str) -> None:
    pass


def _export(module: DPOModule, folder: Path) -> Path:
    """Write the aligned model where an earlier run's may lie."""
    if (folder / "config.json").is_file():
        shutil.rmtree(folder)
    return module.export(folder)


def _write(path: Path, result: DemoResult) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(result.summary(), indent=2) + "\n", encoding="utf-8")
    scratch.replace(path)


class Clock:
    """Wall time of stages.

    Attributes:
        laps: Seconds by the stage's name.
    """

    def __init__(self) -> None:
        """Begin the first stage."""
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """A stage has ended."""
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 2)
        self._last = now
