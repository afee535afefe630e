"""A callback that shows what the policy says and how far it has moved: sampled completions and their KL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_dpo.evaluation.kl import completion_kl
from lightning_dpo.evaluation.sampling import Sample, sample_completions
from lightning_dpo.files import write_file
from lightning_dpo.reference.base import Reference
from lightning_dpo.types import PairBatch

__all__ = ["ComparedPolicy", "CompletionMonitor"]


class ComparedPolicy(Protocol):
    """What the monitor asks of a module.

    Attributes:
        policy: The model that is sampled from.
        reference: What the KL is measured to.
    """

    policy: nn.Module
    reference: Reference


class CompletionMonitor(pl.Callback):
    """After each validation, samples completions of the first validation prompts; logs their KL as val/kl.

    The KL is to the reference, in nats per completion, with its standard error as val/kl_error. The texts
    are written to completions/step-N.jsonl in the logger's folder.
    """

    def __init__(
        self,
        num_prompts: int = 16,
        *,
        samples_per_prompt: int = 1,
        max_new_tokens: int = 128,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        """Say how much to sample.

        Args:
            num_prompts: Validation prompts, of each rank.
            samples_per_prompt: Completions of each.
            max_new_tokens: Longest completion.
            batch_size: Completions sampled at once.
            seed: The same at every validation, so that changes are the policy's.

        Raises:
            ValueError: If a number is below 1.
        """
        numbers = {
            "num_prompts": num_prompts,
            "samples_per_prompt": samples_per_prompt,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
        }
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.num_prompts = num_prompts
        self.samples_per_prompt = samples_per_prompt
        self.options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed}
        self._prompts: list[list[int]] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the prompts of the last validation."""
        self._prompts = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PairBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take prompts until there are enough."""
        missing = self.num_prompts - len(self._prompts)
        if missing > 0:
            prompts = torch.split(batch.prompt_ids, batch.prompt_lengths.tolist())
            self._prompts += [prompt.tolist() for prompt in prompts[:missing]]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample, measure and log.

        Raises:
            ValueError: If no tokenizer is known to end completions with.
        """
        module: ComparedPolicy = pl_module  # type: ignore[assignment]
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is None or isinstance(tokenizer, str):
            raise ValueError(
                "CompletionMonitor needs a data module with a `tokenizer`, such as PreferenceDataModule"
            )
        # Ranks that share a sharded model must call it equally often.
        fewest = trainer.strategy.reduce(torch.tensor(len(self._prompts)), reduce_op="min")
        samples = sample_completions(
            module.policy,
            prompts=[
                prompt for prompt in self._prompts[: int(fewest)] for _ in range(self.samples_per_prompt)
            ],
            eos_token_id=tokenizer.eos_token_id,
            **self.options,
        )
        reference = self.reference(module)
        divergences: Tensor | None = None
        if reference is not None:
            result = completion_kl(
                module.policy, reference=reference, samples=samples, batch_size=self.options["batch_size"]
            )
            divergences = result.kl
            pl_module.log("val/kl", result.estimate.mean, sync_dist=True, prog_bar=True)
            pl_module.log("val/kl_error", result.estimate.standard_error, sync_dist=True)
        log_dir = trainer.log_dir  # rank 0 tells the others, so all must ask
        if trainer.is_global_zero and not trainer.sanity_checking and log_dir is not None:
            path = Path(log_dir) / "completions" / f"step-{trainer.global_step}.jsonl"
            records = _records(samples, divergences, tokenizer)
            write_file(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def reference(self, module: ComparedPolicy) -> nn.Module | None:
        """The model that the KL is measured to; None where its weights are not at hand."""
        if module.reference.model is None and hasattr(module.policy, "disable_adapter"):
            return _AdapterOff(module.policy)
        return module.reference.model


class _AdapterOff(nn.Module):
    """The base model of an adapted one, as a module of its own that maps ids to logits."""

    def __init__(self, adapted: nn.Module) -> None:
        super().__init__()
        self.adapted = adapted

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        adapted: Any = self.adapted
        with adapted.disable_adapter(), torch.no_grad():
            logits: Tensor = adapted(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).logits
        return logits


def _records(samples: list[Sample], divergences: Tensor | None, tokenizer: Any) -> list[dict[str, Any]]:
    return [
        {
            "prompt": tokenizer.decode(sample.prompt_ids),
            "completion": tokenizer.decode(sample.completion_ids, skip_special_tokens=True),
            "tokens": len(sample.completion_ids),
            "kl": None if divergences is None else float(divergences[index]),
        }
        for index, sample in enumerate(samples)
    ]
