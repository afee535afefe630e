"""The demonstration as a sweep: 8 trials on the embedded task, and their report."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning_dpo.demo.task import TaskConfig, prepare_task
from lightning_dpo.tuning.config import SweepConfig
from lightning_dpo.tuning.results import SweepResult
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


def run_demo_sweep(
    *, output: str | Path = Path("outputs/demo"), task: TaskConfig | None = None, verbose: bool = True
) -> SweepResult:
    """Prepare the embedded task, unless that was done before, and sweep over it.

    Args:
        output: Folder for the task and the sweep; an earlier sweep in it is replaced.
        task: Parameters of the task.
        verbose: Show progress.
    """
    root = Path(output).expanduser()
    if verbose:
        print("fitting a small decoder to the grammar and sampling pairs from it, if not done before ...")
    prepare_task(root / "task", config=task, progress=verbose)
    if (root / "sweep" / "trials").is_dir():
        shutil.rmtree(root / "sweep")
    return sweep(demo_sweep_config(root), verbose=verbose)
