"""The sweep of `benchmarks.trl_sweep` as users of TRL write it: DPOTrainer in a plain Ray Tune function."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from typing import Any

from benchmarks.sweep_settings import Settings
from benchmarks.sweep_timeline import DriverMarks, mark, trial_name

__all__ = ["run_trl"]


def run_trl(settings: Settings, folder: str, *, shared: bool) -> tuple[dict[str, float], int, int]:
    """A sweep: accuracies of its trials, pairs that the reference scored, steps of all trials.

    Args:
        settings: What both have in common.
        folder: For all files.
        shared: What TRL lets trials share is shared: the process that drives the sweep tokenises and
            precomputes the reference's log-probs into one cache of `datasets`, where trials find them, and
            processes are reused.
    """
    import ray
    from ray import tune
    from ray.tune.schedulers import AsyncHyperBandScheduler

    mark(folder, "Ray starts")
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    scored = 0
    if shared:
        mark(folder, "preparation")
        scored = make_trainer(settings, folder, f"{folder}/prepared", shared=True).scored
    results = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(trl_trial, settings=settings, folder=folder, shared=shared),
            {"cpu": float(settings.cpus)},
        ),
        param_space={
            "beta": tune.grid_search(list(settings.betas)),
            "lr": tune.grid_search(list(settings.rates)),
        },
        tune_config=tune.TuneConfig(
            metric="eval_rewards/accuracies",
            mode="max",
            scheduler=AsyncHyperBandScheduler(**settings.asha) if settings.asha else None,
            reuse_actors=shared,
        ),
        run_config=tune.RunConfig(
            storage_path=f"{folder}/ray",
            verbose=0,
            callbacks=[DriverMarks(folder)],
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
        ),
    ).fit()
    assert not results.errors, results.errors
    metrics = {settings.key(r.config["beta"], r.config["lr"]): r.metrics for r in results}
    assert all(result.checkpoint is not None for result in results)
    return (
        {key: float(told["eval_rewards/accuracies"]) for key, told in metrics.items()},
        scored + sum(told["reference_pairs"] for told in metrics.values()),
        sum(told["step"] for told in metrics.values()),
    )


def trl_trial(config: Mapping[str, Any], *, settings: Settings, folder: str, shared: bool) -> None:
    """What one would write: load, train, evaluate, save, report."""
    mark(folder, "process and imports", trial=trial_name())
    import torch

    torch.set_num_threads(settings.cpus)
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(settings, folder, output, shared=shared, **config)
        trainer.train()
        if not settings.report_every:
            trainer.evaluate()
        mark(folder, "end of a trial", trial=trial_name())


def make_trainer(
    settings: Settings, folder: str, output: str, *, shared: bool, beta: float = 0.1, lr: float = 1e-6
) -> Any:
    """A DPOTrainer that marks its phases, counts what the reference scores, and reports what it finds."""
    import datasets
    import torch
    import trl
    from ray import tune
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    trial = trial_name()

    def begin(phase: str) -> None:
        if trial:
            mark(folder, phase, trial=trial)

    class Trainer(trl.DPOTrainer):
        scored = 0

        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            begin("data")
            prepared = super()._prepare_dataset(*args, **kwargs)
            begin("model")
            return prepared

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            begin("reference")
            dataset = super()._precompute_ref_logps(*args, **kwargs)
            begin("model")
            return dataset

        def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
            self.scored += len(inputs["input_ids"]) // 2  # chosen and rejected
            return super().compute_ref_log_probs(model, inputs)

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            begin("validation")
            found = super().evaluate(*args, **kwargs)
            begin("checkpoint and report")
            told = {**found, "reference_pairs": self.scored, "step": self.state.global_step}
            with tempfile.TemporaryDirectory() as checkpoint:
                self.save_model(checkpoint)
                tune.report(told, checkpoint=tune.Checkpoint.from_directory(checkpoint))
            begin("steps")
            return found

    class Begins(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            begin("steps")

    begin("data")
    datasets.disable_progress_bars()
    read = {"train": settings.train, "validation": settings.validation}
    cache = f"{folder}/datasets" if shared else output
    rows = datasets.load_dataset("json", data_files=read, cache_dir=cache)
    begin("model")
    every = settings.report_every
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32),
        args=trl.DPOConfig(
            output_dir=output,
            num_train_epochs=1,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            max_length=None,
            beta=beta,
            learning_rate=lr,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=settings.bf16,
            gradient_checkpointing=False,
            precompute_ref_log_probs=shared,
            use_cpu=True,
            dataloader_pin_memory=False,
            eval_strategy="steps" if every else "no",
            eval_steps=every or None,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=AutoTokenizer.from_pretrained(settings.model),
        callbacks=[Begins()],
    )
    if trainer.ref_model is not None:
        _watch(trainer, begin)
    return trainer


def _watch(trainer: Any, begin: Any) -> None:
    """Count and time a reference that runs with each batch."""

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trainer.scored += len(args[0] if args else kwargs["input_ids"]) // 2
        begin("reference")

    def after(*_: Any) -> None:
        begin("steps" if trainer.model.training else "validation")

    trainer.ref_model.register_forward_pre_hook(before, with_kwargs=True)
    trainer.ref_model.register_forward_hook(after)
