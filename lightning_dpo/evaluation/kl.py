"""KL(policy || reference) along sampled completions, exact at every position, without full logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_dpo.evaluation.logits import ModelPair, sum_of_completions
from lightning_dpo.evaluation.sampling import Sample
from lightning_dpo.models.modes import evaluating
from lightning_dpo.scoring.forward import score
from lightning_dpo.scoring.lm_head import CHUNK_ELEMENTS
from lightning_dpo.scoring.select import select_plan
from lightning_dpo.types import CompletionBatch

__all__ = ["Estimate", "KLResult", "completion_batch", "completion_kl", "sample_logps", "token_kl"]


class Estimate(NamedTuple):
    """A mean over completions.

    Attributes:
        mean: The mean.
        standard_error: Its standard error, taking completions as independent; NaN for a single one.
    """

    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Mean and standard error of values, (n,)."""
        wide = values.double()
        error = float(wide.std(correction=1)) / math.sqrt(len(wide)) if len(wide) > 1 else math.nan
        return cls(float(wide.mean()), error)


@dataclass(frozen=True, slots=True)
class KLResult:
    """What two models say about the same completions, nats.

    Attributes:
        kl: For each completion, the sum over its positions of the KL divergence between the two
            next-token distributions, (samples,), float32.
        logratios: For each completion, log policy - log reference, (samples,), float32; times beta it is
            the implied reward.
        entropies: For each completion, the sum over its positions of the entropy of the policy's next-token
            distribution, (samples,), float32.
        lengths: Tokens of each completion, (samples,).
    """

    kl: Tensor
    logratios: Tensor
    entropies: Tensor
    lengths: Tensor

    @property
    def entropy_per_token(self) -> float:
        """Mean entropy of the policy's next-token distributions over all positions, nats."""
        return float(self.entropies.double().sum() / self.lengths.sum())

    @property
    def estimate(self) -> Estimate:
        """KL(policy || reference), Rao-Blackwellised position by position.

        The chain rule writes the KL of sequences as the expected sum of next-token KLs, and each of those
        is summed over the vocabulary instead of sampled. Never negative, and less noisy than `monte_carlo`
        for a policy near its reference. Not for any two models: each term varies less, but where a token
        with a high log-ratio leads to positions with a low KL, the sampled terms cancel and these do not.
        """
        return Estimate.of(self.kl)

    @property
    def monte_carlo(self) -> Estimate:
        """KL(policy || reference) from the sampled tokens' log-ratios alone: unbiased, may be negative."""
        return Estimate.of(self.logratios)


def completion_kl(
    policy: nn.Module,
    *,
    reference: nn.Module,
    samples: Sequence[Sample],
    batch_size: int = 16,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> KLResult:
    """Compare two models along completions.

    For `KLResult.estimate` to be the KL of sequences, the completions must be drawn from the policy at
    temperature 1 and `top_p` 1. For completions from elsewhere only the log-ratios have a meaning.

    Args:
        policy: A Hugging Face causal language model, or a module that maps (input_ids, attention_mask) to
            logits; for the latter, and for a head that cannot be reproduced, logits of one batch exist whole.
        reference: Another such model, over the same vocabulary.
        samples: From `lightning_dpo.evaluation.sampling.sample_completions`, or any completions.
        batch_size: Completions per forward pass; those of similar length run together.
        chunk_elements: Upper bound of the logits of each model that exist at once (at least one token's).

    Returns:
        One value per completion, in the order of `samples`, on the CPU.

    Raises:
        ValueError: If `samples` is empty or holds an empty part, or the vocabularies differ in size.
    """
    if not samples:
        raise ValueError("`samples` must hold at least one completion, got none")
    for index, sample in enumerate(samples):
        if not len(sample.prompt_ids) or not len(sample.completion_ids):
            raise ValueError(f"`samples` must have a prompt and a completion each, got {sample} at {index}")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    order = sorted(range(len(samples)), key=lambda i: _length(samples[i]))
    numbers = torch.zeros(3, len(samples), dtype=torch.float32)
    with evaluating(policy, reference), torch.no_grad():
        models = ModelPair(policy, reference)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            compared = completion_batch([samples[index] for index in batch])
            numbers[:, batch] = _compare(models, compared, chunk_elements)
    lengths = torch.tensor([len(sample.completion_ids) for sample in samples])
    kl, logratios, entropies = numbers
    return KLResult(kl, logratios, entropies, lengths)


def sample_logps(model: nn.Module, *, samples: Sequence[Sample], batch_size: int = 16) -> Tensor:
    """Log-probability of each completion under one model, nats.

    Args:
        model: See `completion_kl`.
        samples: Any completions, from any model.
        batch_size: Completions per forward pass; those of similar length run together.

    Returns:
        (samples,), float32, in the order of `samples`, on the CPU.
    """
    order = sorted(range(len(samples)), key=lambda i: _length(samples[i]))
    logps = torch.zeros(len(samples), dtype=torch.float32)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model), torch.no_grad():
        plan = select_plan(model, layout="concatenated").plan
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            scored = completion_batch([samples[index] for index in batch]).to(device)
            logps[batch] = score(model, scored, plan=plan).logps.cpu().float()
    return logps


def token_kl(logps: Tensor, other_logps: Tensor) -> Tensor:
    """KL of one next-token distribution from another at each position.

    Args:
        logps: Log-probabilities of the first, (tokens, vocab).
        other_logps: Of the other, (tokens, vocab).

    Returns:
        (tokens,), nats.
    """
    # A token that the first excludes (-inf) adds nothing, though 0 times its difference is NaN.
    terms = torch.where(logps == -math.inf, 0.0, logps.exp() * (logps - other_logps))
    # A divergence is never negative; rounding makes that of equal distributions about -1e-8.
    return terms.sum(-1).clamp(min=0)


def _compare(models: ModelPair, batch: CompletionBatch, chunk_elements: int) -> Tensor:
    """Sums over each completion: of next-token KLs, of tokens' log-ratios, of entropies, (3, completions)."""
    divergences, logratios, entropies = [], [], []
    for chunk in models.chunks(batch, chunk_elements=chunk_elements):
        logratios.append(chunk.of_targets(chunk.policy_logps - chunk.reference_logps))
        divergences.append(token_kl(chunk.policy_logps, chunk.reference_logps))
        entropies.append(torch.special.entr(chunk.policy_logps.exp()).sum(-1))
    sums = [sum_of_completions(batch, parts) for parts in (divergences, logratios, entropies)]
    return torch.stack(sums).float()


def completion_batch(samples: Sequence[Sample]) -> CompletionBatch:
    """Samples as a batch: a prompt with one completion each."""
    prompts = [sample.prompt_ids for sample in samples]
    return CompletionBatch.from_lists(prompts, [[sample.completion_ids] for sample in samples])


def _length(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.completion_ids)
