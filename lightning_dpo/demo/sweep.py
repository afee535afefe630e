"""The demonstration as a sweep: 8 trials on the embedded task, and their report."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_dpo.demo.context import quiet
from lightning_dpo.demo.run import Clock, evaluate
from lightning_dpo.demo.tables import print_result
from lightning_dpo.demo.task import TaskConfig, prepare_task
from lightning_dpo.files import discard
from lightning_dpo.tuning.config import SweepConfig
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.run import sweep

__all__ = ["demo_sweep_config", "run_demo_sweep"]


def demo_sweep_config(output: str | Path = Path("outputs/demo")) -> SweepConfig:
    """The sweep over a task that lies in `output`; the same as tuning/demo.yaml."""
    root = Path(output)
    task = root / "task"
    return SweepConfig(
        recipe=[],
        overrides={
            "model.policy": str(task / "model"),
            "model.optimizer.class_path": "torch.optim.SGD",
            "model.optimizer.momentum": 0.9,
            "data.train": str(task / "train.jsonl"),
            "data.validation": str(task / "validation.jsonl"),
            "data.max_length": 128,
            "data.batch_size": 64,
            "data.num_processes": 1,
            "trainer.max_epochs": 2,
            "trainer.val_check_interval": 0.5,
            "seed_everything": 0,
        },
        space={
            "model.loss.beta": {"loguniform": [0.03, 1.0]},
            "model.optimizer.lr": {"loguniform": [0.002, 0.05]},
        },
        samples=8,
        scheduler="asha",
        kl_prompts=32,
        kl_tokens=40,
        storage=str(root),
        name="sweep",
    )


@quiet()
def run_demo_sweep(
    *,
    output: str | Path = Path("outputs/demo"),
    task: TaskConfig | None = None,
    samples_per_prompt: int = 256,
    verbose: bool = True,
) -> SweepResult:
    """Prepare the embedded task, unless that was done before, sweep over it, and show what the best did.

    Args:
        output: Folder for the task and the sweep; an earlier sweep in it is replaced.
        task: Parameters of the task.
        samples_per_prompt: Reviews of each prompt to sample from the best model and from its reference.
        verbose: Show progress.
    """
    root = Path(output).expanduser()
    clock = Clock()
    if verbose:
        print("fitting a small decoder to the grammar and sampling pairs from it, if not done before ...")
    made = prepare_task(root / "task", config=task, progress=verbose and sys.stdout.isatty())
    clock.lap("prepare")
    if (root / "sweep" / "trials").is_dir():
        discard(root / "sweep")
    result = sweep(demo_sweep_config(root), verbose=verbose)
    clock.lap("sweep")
    assert result.model is not None  # trials of one process leave checkpoints of one file
    best = result.best
    accuracy = float(best.metrics["val/rewards/accuracy"])
    winner = evaluate(
        made, Path(result.model), accuracy=accuracy, samples_per_prompt=samples_per_prompt, clock=clock
    )
    if verbose:
        print_result(winner, beta=float(best.overrides["model.loss.beta"]))
        print(f"reference passes: {result.reference_passes} for {len(result.trials)} trials")
        print(f"open in a browser: {result.report_path}")
    return result
