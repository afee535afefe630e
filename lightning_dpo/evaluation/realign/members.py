"""Members of a family at decoding time: sampled from, at the cost of both models, and measured."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from lightning_dpo.evaluation.kl import Estimate, completion_batch
from lightning_dpo.evaluation.logits import ModelPair
from lightning_dpo.evaluation.realign.family import check_scales, realigned_logps, score_family
from lightning_dpo.evaluation.sampling import Sample, sample_completions
from lightning_dpo.models.adapter_off import AdapterOff
from lightning_dpo.models.modes import evaluating
from lightning_dpo.models.own import model_logits
from lightning_dpo.models.unwrap import causal_lm

__all__ = ["RealignedModel", "RealignedSamples", "realigned_model", "realigned_samples"]


class RealignedModel(nn.Module):
    """One member of the family at decoding time: maps (input_ids, attention_mask) to its log-probabilities.

    Attributes:
        policy: The trained model.
        reference: What it was trained from.
        scale: lambda.
    """

    def __init__(self, policy: nn.Module, *, reference: nn.Module, scale: float) -> None:
        """Combine two models over one vocabulary.

        Raises:
            ValueError: If `scale` is negative or not finite.
        """
        super().__init__()
        check_scales([scale])
        self.policy = policy
        self.reference = reference
        self.scale = scale

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Next-token log-probabilities, (rows, seq_len, vocab), float32 or wider."""
        ours, theirs = (
            _wide(model_logits(model, input_ids, attention_mask)).log_softmax(-1)
            for model in (self.policy, self.reference)
        )
        return realigned_logps(ours, theirs.to(ours.device), scale=self.scale)


class _GeneratingRealignedModel(RealignedModel):
    """A member of two Hugging Face models, which each keep what they computed of earlier tokens."""

    def generate(self, *, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """The policy's `generate`, with the reference beside it; see transformers."""
        policy: Any = self.policy
        beside = _BesideReference(self.reference, attention_mask, self.scale)
        output: Tensor = policy.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([beside]),
            **kwargs,
        )
        return output


class _BesideReference(LogitsProcessor):
    """Turns the policy's next-token logits into the member's, step by step."""

    def __init__(self, reference: nn.Module, attention_mask: Tensor, scale: float) -> None:
        lm = reference.adapted if isinstance(reference, AdapterOff) else reference
        takes = inspect.signature(causal_lm(lm).forward).parameters
        self._takes_positions = "position_ids" in takes
        self._reference = reference
        self._mask = attention_mask
        self._scale = scale
        self._cache: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits of the next token, (rows, vocab), given all ids so far."""
        grown = input_ids.shape[1] - self._mask.shape[1]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(input_ids), grown)], dim=1)
        options: dict[str, Any] = {"attention_mask": self._mask, "use_cache": True}
        if self._takes_positions:  # prompts are padded on the left
            options["position_ids"] = (self._mask.cumsum(-1) - 1).clamp(min=0)
        new = input_ids
        if self._cache is not None:
            new = input_ids[:, -grown:]
            options["past_key_values"] = self._cache
            if self._takes_positions:
                options["position_ids"] = options["position_ids"][:, -grown:]
        output = self._reference(input_ids=new, **options)
        self._cache = getattr(output, "past_key_values", None)
        theirs = _wide(output.logits[:, -1]).to(scores.device)
        return realigned_logps(_wide(scores).log_softmax(-1), theirs.log_softmax(-1), scale=self._scale)


def realigned_model(policy: nn.Module, *, reference: nn.Module, scale: float) -> RealignedModel:
    """A member of the family; for two Hugging Face models one that `generate`s at the cost of both.

    Args:
        policy: The trained model.
        reference: What it was trained from, an `AdapterOff` of the policy included; over one vocabulary.
        scale: lambda of `realigned_logps`.

    Raises:
        ValueError: If `scale` is negative or not finite.
    """
    inner = (policy, reference.adapted if isinstance(reference, AdapterOff) else reference)
    generates = all(isinstance(causal_lm(model), PreTrainedModel) for model in inner)
    kind = _GeneratingRealignedModel if generates else RealignedModel
    return kind(policy, reference=reference, scale=scale)


@dataclass(frozen=True, slots=True)
class RealignedSamples:
    """Completions drawn from one member of a family, and what it and the reference say of them, nats.

    Attributes:
        scale: lambda.
        samples: The completions, one for each prompt.
        logps: log pi_lambda of each, (samples,), float32.
        reference_logps: log pi_ref of each, (samples,), float32.
        kl: Sum over each one's positions of KL(pi_lambda || pi_ref), (samples,), float32.
    """

    scale: float
    samples: list[Sample]
    logps: Tensor
    reference_logps: Tensor
    kl: Tensor

    @property
    def estimate(self) -> Estimate:
        """KL(pi_lambda || pi_ref), see `KLResult.estimate`."""
        return Estimate.of(self.kl)


def realigned_samples(
    policy: nn.Module,
    *,
    reference: nn.Module,
    prompts: Sequence[Sequence[int]],
    scale: float,
    eos_token_id: int | Sequence[int],
    pad_token_id: int = 0,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_size: int = 64,
) -> RealignedSamples:
    """Sample from a member of the family at temperature 1, and measure how far it is from the reference.

    Args:
        policy: The trained model.
        reference: What it was trained from, over the same vocabulary.
        prompts: Token ids of each prompt; repeat one for several completions.
        scale: lambda of `realigned_logps`.
        eos_token_id: The token, or tokens, that end a completion.
        pad_token_id: Fills rows; never part of a result.
        max_new_tokens: Longest completion.
        seed: See `sample_completions`.
        batch_size: Prompts sampled, and completions scored, at once.

    Raises:
        ValueError: If an argument is out of its range, a prompt is empty, or the vocabularies differ.
    """
    check_scales([scale])
    member = policy if scale == 1 else realigned_model(policy, reference=reference, scale=scale)
    samples = sample_completions(
        member,
        prompts=prompts,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
    )
    logps, reference_logps, kl = torch.zeros(3, len(samples), dtype=torch.float32)
    order = sorted(range(len(samples)), key=lambda i: sum(map(len, samples[i][:2])))
    with evaluating(policy, reference):
        models = ModelPair(policy, reference)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            scores = score_family(models, completion_batch([samples[i] for i in part]), scales=[scale])
            logps[part], kl[part] = scores.logps[0], scores.kl[0]
            reference_logps[part] = scores.reference_logps
    return RealignedSamples(scale, samples, logps, reference_logps, kl)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(torch.float32, logits.dtype))
