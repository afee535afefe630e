"""A sweep of 8 trials in a process of its own: ours, or TRL's DPOTrainer in a plain Ray Tune function.

Run by `benchmarks.trl_sweep`: ``python -m benchmarks.sweep_child VARIANT SETTINGS.json RESULT.json``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["VARIANTS", "Outcome", "Settings"]

BETAS = (0.05, 0.1, 0.2, 0.4)


class Settings(NamedTuple):
    """What both have in common."""

    model: str
    train: str
    validation: str
    batch_size: int
    cpus: int
    bf16: bool
    rates: Sequence[float]


class Outcome(NamedTuple):
    """What a sweep did.

    Attributes:
        accuracies: Held-out accuracy of each trial, by "beta, learning rate".
        reference_pairs: Pairs that a reference scored, training and validation together.
        pairs: Pairs of the work.
    """

    accuracies: dict[str, float]
    reference_pairs: int
    pairs: int


def run_ours(settings: Settings) -> Outcome:
    from lightning_dpo.tuning import SweepConfig, sweep

    with tempfile.TemporaryDirectory() as folder:
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
                    "trainer.precision": "bf16-mixed" if settings.bf16 else "32-true",
                    "trainer.gradient_clip_val": 1.0,
                },
                space={
                    "model.loss.beta": {"grid": list(BETAS)},
                    "model.optimizer.lr": {"grid": list(settings.rates)},
                },
                search="grid",
                samples=1,
                cpus=settings.cpus,
                storage=folder,
                name="sweep",
                export=False,
            ),
            verbose=False,
        )
    assert all(trial.status == "finished" for trial in result.trials), result.trials
    pairs = _lines(settings.train) + _lines(settings.validation)
    accuracies = {
        _key(trial.overrides["model.loss.beta"], trial.overrides["model.optimizer.lr"]): float(
            trial.metrics["val/rewards/accuracy"]
        )
        for trial in result.trials
    }
    return Outcome(accuracies, result.reference_passes * pairs, pairs)


def run_trl(settings: Settings) -> Outcome:
    import ray
    from ray import tune

    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        results = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(trl_trial, settings=settings), {"cpu": float(settings.cpus)}
            ),
            param_space={"beta": tune.grid_search(list(BETAS)), "lr": tune.grid_search(list(settings.rates))},
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
    assert not results.errors, results.errors
    accuracies = {
        _key(result.config["beta"], result.config["lr"]): float(result.metrics["eval_rewards/accuracies"])
        for result in results
    }
    passed = sum(result.metrics["reference_pairs"] for result in results)
    return Outcome(accuracies, passed, _lines(settings.train) + _lines(settings.validation))


def trl_trial(config: dict[str, Any], *, settings: Settings) -> None:
    """What one would write: load, train, evaluate, report."""
    import datasets
    import torch
    import trl
    from ray import tune
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(settings.cpus)
    datasets.disable_progress_bars()
    read = {"train": settings.train, "validation": settings.validation}
    with tempfile.TemporaryDirectory() as folder:
        rows = datasets.load_dataset("json", data_files=read, cache_dir=folder)
        trainer = trl.DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32),
            args=trl.DPOConfig(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=settings.batch_size,
                per_device_eval_batch_size=settings.batch_size,
                max_length=None,
                beta=config["beta"],
                learning_rate=config["lr"],
                lr_scheduler_type="constant",
                optim="adamw_torch",
                weight_decay=0.0,
                max_grad_norm=1.0,
                bf16=settings.bf16,
                gradient_checkpointing=False,
                use_cpu=True,
                dataloader_pin_memory=False,
                eval_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=rows["train"],
            eval_dataset=rows["validation"],
            processing_class=AutoTokenizer.from_pretrained(settings.model),
        )
        scored = 0

        def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal scored
            scored += len(args[0] if args else kwargs["input_ids"]) // 2  # chosen and rejected

        trainer.ref_model.register_forward_pre_hook(count, with_kwargs=True)
        trainer.train()
        found = trainer.evaluate()
        tune.report({**found, "reference_pairs": scored})


VARIANTS: dict[str, Callable[[Settings], Outcome]] = {"ours": run_ours, "trl": run_trl}


def _lines(path: str) -> int:
    return len(Path(path).read_text().splitlines())


def _key(beta: float, rate: float) -> str:
    return f"{beta:g}, {rate:g}"


def main() -> None:
    variant, settings_file, result_file = sys.argv[1:]
    os.environ["OMP_NUM_THREADS"] = "1"
    settings = Settings(**json.loads(Path(settings_file).read_text()))
    Path(result_file).write_text(json.dumps(VARIANTS[variant](settings)._asdict()))


if __name__ == "__main__":
    main()
