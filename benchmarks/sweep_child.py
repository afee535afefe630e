"""A sweep in a process of its own: ours, or TRL's DPOTrainer in a plain Ray Tune function.

Run by `benchmarks.trl_sweep`: ``python -m benchmarks.sweep_child VARIANT SETTINGS.json RESULT.json``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.sweep_settings import VARIANTS, Outcome, Settings
from benchmarks.sweep_timeline import mark, phases


def run_ours(settings: Settings, folder: str) -> tuple[dict[str, float], int, int]:
    """Our sweep: accuracies of its trials, pairs that the reference scored, steps of all trials."""
    from lightning_dpo.tuning import SweepConfig, sweep

    mark(folder, "Ray starts")
    result = sweep(
        SweepConfig(
            recipe=[],
            overrides={
                "model.policy": settings.model,
                "model.optimizer.class_path": "torch.optim.AdamW",
                "model.optimizer.weight_decay": 0.0,
                "model.warmup_ratio": 0.0,
                "data.train": settings.train,
                "data.validation": settings.validation,
                "data.batch_size": settings.batch_size,
                "data.cache_dir": f"{folder}/cache",
                "data.num_processes": 1,
                "trainer.max_epochs": 1,
                "trainer.val_check_interval": settings.report_every or 1.0,
                "trainer.precision": "bf16-mixed" if settings.bf16 else "32-true",
                "trainer.gradient_clip_val": 1.0,
                "trainer.callbacks": [
                    {"class_path": "benchmarks.sweep_timeline.Timeline", "init_args": {"folder": folder}}
                ],
            },
            space={
                "model.loss.beta": {"grid": list(settings.betas)},
                "model.optimizer.lr": {"grid": list(settings.rates)},
            },
            search="grid",
            samples=1,
            scheduler={"class_path": "asha", "init_args": settings.asha} if settings.asha else "none",
            cpus=settings.cpus,
            callbacks=[
                {"class_path": "benchmarks.sweep_timeline.DriverMarks", "init_args": {"folder": folder}}
            ],
            storage=folder,
            name="sweep",
            export=False,
        ),
        verbose=False,
    )
    assert all(trial.is_ranked for trial in result.trials), result.trials
    accuracies = {
        settings.key(trial.overrides["model.loss.beta"], trial.overrides["model.optimizer.lr"]): float(
            trial.metrics["val/rewards/accuracy"]
        )
        for trial in result.trials
    }
    steps = sum(trial.step for trial in result.trials)
    return accuracies, result.reference_passes * settings.pairs, steps


def measure(variant: str, settings: Settings) -> Outcome:
    """Run a variant, and say where its seconds went."""
    from benchmarks.sweep_trl import run_trl

    with tempfile.TemporaryDirectory() as folder:
        mark(folder, "start and imports")
        if variant == "ours":
            found: Any = run_ours(settings, folder)
        else:
            found = run_trl(settings, folder, shared=variant == "trl-shared")
        trial, sweep = phases(folder)
    return Outcome(*found, settings.pairs, trial, sweep)


def main() -> None:
    variant, settings_file, result_file = sys.argv[1:]
    assert variant in VARIANTS
    settings = Settings(**json.loads(Path(settings_file).read_text()))
    Path(result_file).write_text(json.dumps(measure(variant, settings)._asdict()))


if __name__ == "__main__":
    main()
