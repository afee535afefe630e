"""A callback that shows what the policy says and how far it has moved: sampled completions and their KL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_dpo.evaluation.compare import compare_samples, sample_reference
from lightning_dpo.evaluation.judges import (
    AnyJudge,
    ModelJudge,
    is_pairwise,
    judge_name,
    judge_samples,
    load_judge,
)
from lightning_dpo.evaluation.kl import Estimate, completion_kl
from lightning_dpo.evaluation.sampling import Sample, end_tokens, sample_completions
from lightning_dpo.files import write_file
from lightning_dpo.models.adapter_off import AdapterOff
from lightning_dpo.models.unwrap import is_sharded
from lightning_dpo.reference.base import Reference
from lightning_dpo.types import PairBatch
from lightning_dpo.types.checks import check_bounds

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

    The KL is to the reference, in nats per completion, with its standard error as val/kl_error. Their mean
    length is val/samples/tokens, and the policy's entropy along them, in nats per token,
    val/samples/entropy: one that grows and one that falls are signs that training goes wrong. With a judge
    there are val/score, the mean of what it gives the completions, with its standard error over prompts as
    val/score_error, and val/win_rate, against completions of the reference. The texts are written to
    completions/step-N.jsonl in the logger's folder.

    Where `tokens_per_batch` fills batches by length, the first prompts are the shortest ones; trials of a
    sweep draw theirs from all of them.

    What needs the reference is left out where its weights are not at hand, as with `reference="cached"`.

    Attributes:
        verdicts: Completions of the last validation, each with what the judge said: "policy_score" of one
            that scores, and "win" where there is a completion of the reference to hold it against.
    """

    def __init__(
        self,
        num_prompts: int = 16,
        *,
        samples_per_prompt: int = 1,
        max_new_tokens: int = 128,
        batch_size: int = 16,
        seed: int = 0,
        judge: str | AnyJudge | None = None,
    ) -> None:
        """Say how much to sample.

        Args:
            num_prompts: Validation prompts, of each rank.
            samples_per_prompt: Completions of each.
            max_new_tokens: Longest completion.
            batch_size: Completions sampled at once.
            seed: The same at every validation, so that changes are the policy's.
            judge: Scores the completions: a callable of (prompts, completions), or of (prompts, first,
                second) that says how likely the first is better; the dotted path of one; or the folder or
                hub id of a reward model.

        Raises:
            ValueError: If a number is below 1, or there is no such judge.
        """
        check_bounds(
            least=1,
            num_prompts=num_prompts,
            samples_per_prompt=samples_per_prompt,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        self.num_prompts = num_prompts
        self.samples_per_prompt = samples_per_prompt
        self.options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed}
        self.judge = None if judge is None else load_judge(judge)
        self.verdicts: list[tuple[Sample, dict[str, Any]]] = []
        self._prompts: list[list[int]] = []
        self._reference_answers: list[Sample] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the judge, if it is a model; what the reference said in another run is forgotten."""
        self._reference_answers = []
        if isinstance(self.judge, ModelJudge):
            self.judge.load()

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
            ValueError: If no tokenizer is known to end completions with, or the judge cannot judge.
        """
        module: ComparedPolicy = pl_module  # type: ignore[assignment]
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is None or isinstance(tokenizer, str):
            raise ValueError(
                "CompletionMonitor needs a data module with a `tokenizer`, such as PreferenceDataModule"
            )
        # Ranks that share a sharded model must call it equally often.
        own = torch.tensor(len(self._prompts), device=pl_module.device)
        fewest = trainer.strategy.reduce(own, reduce_op="min")
        samples = sample_completions(
            module.policy,
            prompts=[
                prompt for prompt in self._prompts[: int(fewest)] for _ in range(self.samples_per_prompt)
            ],
            eos_token_id=end_tokens(tokenizer, model=module.policy),
            **self.options,
        )
        tokens = sum(len(sample.completion_ids) for sample in samples) / len(samples)
        pl_module.log("val/samples/tokens", tokens, sync_dist=True)
        reference = self.reference(module)
        divergences: Tensor | None = None
        if reference is not None:
            result = completion_kl(
                module.policy, reference=reference, samples=samples, batch_size=self.options["batch_size"]
            )
            divergences = result.kl
            pl_module.log("val/kl", result.estimate.mean, sync_dist=True, prog_bar=True)
            _log_error(pl_module, "val/kl_error", result.estimate.standard_error)
            pl_module.log("val/samples/entropy", result.entropy_per_token, sync_dist=True)
        verdicts = self._log_judged(pl_module, samples, reference, tokenizer)
        self.verdicts = list(zip(samples, verdicts, strict=True))
        log_dir = trainer.log_dir  # rank 0 tells the others, so all must ask
        if trainer.is_global_zero and not trainer.sanity_checking and log_dir is not None:
            path = Path(log_dir) / "completions" / f"step-{trainer.global_step}.jsonl"
            records = _records(samples, divergences, verdicts, tokenizer)
            write_file(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def reference(self, module: ComparedPolicy) -> nn.Module | None:
        """The model that the KL is measured to; None where its weights are not at hand."""
        if module.reference.model is None and hasattr(module.policy, "disable_adapter"):
            return AdapterOff(module.policy)
        return module.reference.model

    def _log_judged(
        self, module: pl.LightningModule, samples: list[Sample], reference: nn.Module | None, tokenizer: Any
    ) -> list[dict[str, Any]]:
        """Log what the judge says, and tell what it says of each sample."""
        if self.judge is None:
            return [{} for _ in samples]
        if reference is not None:
            result = compare_samples(
                self.judge,
                policy_samples=samples,
                reference_samples=self._answers_of(reference, samples, tokenizer, module),
                tokenizer=tokenizer,
                samples_per_prompt=self.samples_per_prompt,
            )
            module.log("val/win_rate", result.win_rate.rate, sync_dist=True)
            if result.policy_score is not None:
                module.log("val/score", result.policy_score.mean, sync_dist=True)
                _log_error(module, "val/score_error", result.policy_score.standard_error)
            said = ("policy_score", "reference", "reference_score", "win")
            return [{name: getattr(answer, name) for name in said} for answer in result.answers]
        if is_pairwise(self.judge):
            raise ValueError(
                "`judge` must score completions one by one where the reference's weights are not at hand to "
                f'sample from, got {judge_name(self.judge)}, which compares two; or take reference="frozen"'
            )
        scorer: Any = self.judge
        scores = judge_samples(scorer, samples, tokenizer=tokenizer)
        score = Estimate.of(scores.view(-1, self.samples_per_prompt).double().mean(1))
        module.log("val/score", score.mean, sync_dist=True)
        _log_error(module, "val/score_error", score.standard_error)
        return [{"policy_score": score} for score in scores.tolist()]

    def _answers_of(
        self, reference: nn.Module, samples: list[Sample], tokenizer: Any, module: Any
    ) -> list[Sample]:
        """The reference's completions of the same prompts; sampled once if it does not change."""
        prompts = [sample.prompt_ids for sample in samples]
        # Ranks that share a model must sample from it equally often.
        moves = is_sharded(reference) or getattr(module, "reference_follows", False)
        if moves or [sample.prompt_ids for sample in self._reference_answers] != prompts:
            options: dict[str, Any] = {**self.options, "seed": self.options["seed"] + 1}
            self._reference_answers = sample_reference(
                reference, prompts=prompts, eos_token_id=end_tokens(tokenizer, model=module.policy), **options
            )
        return self._reference_answers


def _log_error(module: pl.LightningModule, name: str, error: float) -> None:
    """Log the standard error of the mean over ranks, of which each says what its own mean's is.

    Means are of as many completions on each rank; ranks that share a model sample the same prompts.
    """
    trainer = module.trainer
    square = torch.tensor(error**2, dtype=torch.float32, device=module.device)
    means = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
    module.log(name, (trainer.strategy.reduce(square, reduce_op="mean") / means).sqrt(), sync_dist=True)


def _records(
    samples: list[Sample], divergences: Tensor | None, verdicts: list[dict[str, Any]], tokenizer: Any
) -> list[dict[str, Any]]:
    return [
        {
            "prompt": tokenizer.decode(sample.prompt_ids),
            "completion": tokenizer.decode(sample.completion_ids, skip_special_tokens=True),
            "tokens": len(sample.completion_ids),
            "kl": None if divergences is None else float(divergences[index]),
            **verdicts[index],
        }
        for index, sample in enumerate(samples)
    ]
