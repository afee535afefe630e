"""One variant in a process of its own: load, train a few steps, write what was measured.

Run by `benchmarks.trl_throughput`: ``python -m benchmarks.child VARIANT SETTINGS.json RESULT.json``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from benchmarks.measure import Measurement, Meter
from benchmarks.workload import Workload

__all__ = ["VARIANTS", "Settings", "run_variant"]

LEARNING_RATE = 1e-6
BETA = 0.1
MAX_GRAD_NORM = 1.0


class Settings(NamedTuple):
    """What all variants have in common; see `benchmarks.measure.Meter` for what steps there are."""

    workload: str
    steps: int
    warmup: int
    batch_size: int
    threads: int
    gradient_checkpointing: bool
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    precision: Literal["bf16", "float32"] = "bf16"
    lora_rank: int = 0
    device: str = "cpu"
    watched: int = 0


def run_ours(
    settings: Settings,
    *,
    layout: Any = "auto",
    cached: bool = False,
    packed: bool = False,
    **more: Any,
) -> Measurement:
    import lightning.pytorch as pl
    from torch.optim import AdamW
    from torch.utils.data import DataLoader

    from benchmarks.packing import PackedSequences
    from lightning_dpo import DPOModule, PairBatch
    from lightning_dpo.losses import DPOLoss, IPOLoss
    from lightning_dpo.models.lora import LoraSettings

    meter = _meter(settings)
    workload = Workload(Path(settings.workload), "")

    class Measuring(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.fit_began = time.perf_counter()

        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if cached:  # what lies between is the reference's pass over the data
                meter.precompute_seconds = time.perf_counter() - self.fit_began
            meter.count(pl_module.policy, "policy")
            if pl_module.reference_model is not None:
                meter.count(pl_module.reference_model, "reference")
            meter.note = str(pl_module._selection)
            meter.training_starts()

        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            # Lightning's own clipping refuses fused optimizers, in bfloat16 too, where nothing is unscaled.
            torch.nn.utils.clip_grad_norm_(pl_module.policy.parameters(), MAX_GRAD_NORM)

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            meter.step_ends()
            meter.losses.append(pl_module.latest.losses.mean())  # read when all is over

    rank = settings.lora_rank
    on_gpu = settings.device != "cpu"
    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "loss": DPOLoss(beta=BETA) if settings.loss == "sigmoid" else IPOLoss(beta=BETA),
            "optimizer": lambda params: AdamW(params, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
            "warmup_ratio": 0.0,
            "layout": layout,
            "gradient_checkpointing": settings.gradient_checkpointing,
            "lora": LoraSettings(r=rank, alpha=2 * rank) if rank else None,
            "reference": "cached" if cached else "adapter" if rank else "frozen",
            "reference_cache": f"{folder}/cache" if cached else None,
        }
        module = (PackedSequences if packed else DPOModule)(str(workload.model), **(arguments | more))
        trainer = pl.Trainer(
            max_steps=meter.all_steps,
            accelerator="gpu" if on_gpu else "cpu",
            devices=1,
            precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
            callbacks=[Measuring()],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(
            module,
            DataLoader(
                workload.pairs(),  # type: ignore[arg-type]
                batch_size=settings.batch_size,
                collate_fn=PairBatch.from_pairs,
                pin_memory=on_gpu,
            ),
        )
    return meter.result()


def run_trl(settings: Settings, *, precompute: bool = False, liger: bool = False) -> Measurement:
    import datasets
    import peft
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    datasets.disable_progress_bars()
    meter = _meter(settings)
    workload = Workload(Path(settings.workload), "")

    class Tokenised(trl.DPOTrainer):
        """DPOTrainer on rows that are tokenised already; otherwise unchanged."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = super()._precompute_ref_logps(*args, **kwargs)
            meter.precompute_seconds += time.perf_counter() - started
            return result

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            meter.losses.append(loss.detach())  # read when all is over
            return loss

    class Measuring(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.count(trainer.model, "policy")
            if trainer.ref_model is not None:
                meter.count(trainer.ref_model, "reference")
            meter.training_starts()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step_ends()

    rank = settings.lora_rank
    adapter = None
    if rank:
        shape = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
        adapter = peft.LoraConfig(**shape, task_type="CAUSAL_LM")
    on_gpu = settings.device != "cpu"
    with tempfile.TemporaryDirectory() as folder:
        trainer = Tokenised(
            model=AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.float32),
            args=trl.DPOConfig(
                output_dir=folder,
                max_steps=meter.all_steps,
                per_device_train_batch_size=settings.batch_size,
                train_sampling_strategy="sequential",
                max_length=None,
                beta=BETA,
                loss_type=settings.loss,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                weight_decay=0.0,
                max_grad_norm=MAX_GRAD_NORM,
                bf16=settings.precision == "bf16",
                gradient_checkpointing=settings.gradient_checkpointing,
                precompute_ref_log_probs=precompute,
                use_liger_kernel=liger,
                use_cpu=not on_gpu,
                dataloader_pin_memory=on_gpu,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list([pair._asdict() for pair in workload.pairs()]),
            processing_class=AutoTokenizer.from_pretrained(workload.model),
            callbacks=[Measuring()],
            peft_config=adapter,
        )
        meter.note = f"attention {trainer.model.config._attn_implementation}"
        trainer.train()
    return meter.result()


VARIANTS: dict[str, Callable[[Settings], Measurement]] = {
    "ours": run_ours,
    "ours-cached": lambda settings: run_ours(settings, cached=True),
    "ours-compiled": lambda settings: run_ours(settings, compile_model=True, reference_dtype="bfloat16"),
    "ours-lean": lambda settings: run_ours(settings, gradient_checkpointing="selective"),
    "ours-concatenated": lambda settings: run_ours(settings, layout="concatenated"),
    "packed": lambda settings: run_ours(settings, packed=True),
    "trl": run_trl,
    "trl-liger": lambda settings: run_trl(settings, liger=True),
    "trl-precomputed": lambda settings: run_trl(settings, precompute=True),
}


def run_variant(variant: str, settings: Settings) -> Measurement:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    return VARIANTS[variant](settings)


def _meter(settings: Settings) -> Meter:
    return Meter(
        steps=settings.steps,
        warmup=settings.warmup,
        batch_size=settings.batch_size,
        device=settings.device,
        watched=settings.watched,
    )


def main() -> None:
    variant, settings_file, result_file = sys.argv[1:]
    settings = Settings(**json.loads(Path(settings_file).read_text()))
    measurement = run_variant(variant, settings)
    Path(result_file).write_text(json.dumps(measurement._asdict()))


if __name__ == "__main__":
    main()
