"""The whole demonstration: prepare the task, align the small decoder with DPO, and show what changed."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import torch

from lightning_dpo.data.datamodule import PreferenceDataModule
from lightning_dpo.demo.context import quiet, quiet_trainer, single_thread
from lightning_dpo.demo.measure import agreement, best_reachable, measure
from lightning_dpo.demo.result import DemoResult
from lightning_dpo.demo.tables import print_result
from lightning_dpo.demo.task import Task, TaskConfig, load_pairs, prepare_task
from lightning_dpo.files import discard
from lightning_dpo.losses import DPOLoss
from lightning_dpo.models.load import load_model, load_tokenizer
from lightning_dpo.training.dpo import DPOModule

__all__ = ["Clock", "evaluate", "run_demo"]

_MAX_LENGTH = 128


@quiet()
@single_thread()
def run_demo(
    *,
    output: str | Path = Path("outputs/demo"),
    beta: float = 0.4,
    lr: float = 0.01,
    epochs: int = 4,
    batch_size: int = 64,
    samples_per_prompt: int = 256,
    seed: int = 0,
    task: TaskConfig | None = None,
    verbose: bool = True,
) -> DemoResult:
    """Run the demonstration: about a minute on two cores, less where the task is prepared already.

    SGD with momentum trains the policy. A step of Adam is as long for a weight whose gradient is noise
    as for one that carries the preference; at this size that wears the grammar down. Gradients are clipped,
    since that of the sigmoid loss grows with beta: without it a large beta would take large steps, and move
    further from the reference rather than less far, until nothing grammatical is left.

    Args:
        output: Folder for the task, the aligned model (`policy`) and the figures (`result.json`).
        beta: Strength of the pull towards the reference.
        lr: Highest learning rate: a tenth of the steps warm up to it, and the others fall to 0.
        epochs: Passes over the training pairs.
        batch_size: Pairs of a step.
        samples_per_prompt: Reviews of each prompt that the evaluation samples from each model.
        seed: Seeds task, training and samples; a `task` that is given has a seed of its own.
        task: Parameters of the task.
        verbose: Show progress bars and print the table.

    Raises:
        ValueError: If `beta` is not greater than 0.
    """
    loss = DPOLoss(beta=beta)
    root = Path(output).expanduser()
    clock = Clock()
    progress = verbose and sys.stdout.isatty()

    def say(text: str) -> None:
        if verbose:
            print(text)

    say("fitting a small decoder to the grammar and sampling pairs from it, unless that was done before ...")
    made = prepare_task(root / "task", config=task or TaskConfig(seed=seed), progress=progress)
    clock.lap("prepare")
    say("training with DPO ...")
    module: DPOModule = DPOModule(
        str(made.model),
        loss=loss,
        optimizer=lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=lr,
            total_steps=int(module.trainer.estimated_stepping_batches),
            pct_start=0.1,
            anneal_strategy="linear",
            cycle_momentum=False,
        ),
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
        print_result(result, beta=beta)
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
        accuracy: Validation accuracy that the trainer logged at the end.
        samples_per_prompt: Reviews of each prompt from each model.
        seed: Seeds the samples.
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
    result.save()
    return result


def _fit(module: DPOModule, data: PreferenceDataModule, *, epochs: int, progress: bool) -> float:
    """Train, and return the validation accuracy at the end."""
    with quiet():
        trainer = quiet_trainer(max_epochs=epochs, progress=progress)
        trainer.fit(module, data)
    return float(trainer.callback_metrics["val/rewards/accuracy"])


def _export(module: DPOModule, folder: Path) -> Path:
    """Write the aligned model where an earlier run's may lie."""
    if (folder / "config.json").is_file():
        discard(folder)
    return module.export(folder)


class Clock:
    """A stopwatch for the stages of the demonstration.

    Attributes:
        laps: Seconds of each stage, by its name.
    """

    def __init__(self) -> None:
        """Begin the first stage."""
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a stage, and begin the next one."""
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 2)
        self._last = now
