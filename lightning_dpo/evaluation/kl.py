"""KL(policy || reference) along sampled completions, exact at every position, without full logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightning_dpo.evaluation.sampling import Sample
from lightning_dpo.models.modes import evaluating
from lightning_dpo.models.unwrap import is_sharded
from lightning_dpo.scoring.forward import ScoringPlan, completion_logits, lay_out
from lightning_dpo.scoring.lm_head import CHUNK_ELEMENTS
from lightning_dpo.scoring.select import select_plan
from lightning_dpo.types import CompletionBatch

__all__ = ["Estimate", "KLResult", "completion_kl"]

_Logits: TypeAlias = Callable[[slice], Tensor]


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
    """

    kl: Tensor
    logratios: Tensor

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
    divergences, logratios = torch.zeros(len(samples)), torch.zeros(len(samples))
    with evaluating(policy, reference), torch.no_grad():
        scorers = [_Scorer(model) for model in (policy, reference)]
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            compared = _batch([samples[index] for index in batch])
            divergences[batch], logratios[batch] = _compare(scorers, compared, chunk_elements)
    return KLResult(divergences, logratios)


class _Scorer:
    """Runs a model and hands out logits of its completion positions, a slice at a time."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # A sharded model gathers its weights when it is called, and not when its parts are.
        self.plan = ScoringPlan() if is_sharded(model) else select_plan(model, layout="concatenated").plan
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def logits(self, batch: CompletionBatch) -> _Logits:
        """Logits of a slice of the completion tokens, (slice, vocab), float32 or wider."""
        rows = lay_out(batch.to(self.device), model=self.model, plan=self.plan)
        return completion_logits(self.model, rows, plan=self.plan)


def _compare(
    scorers: Sequence[_Scorer], batch: CompletionBatch, chunk_elements: int
) -> tuple[Tensor, Tensor]:
    """Sums over each completion: of the next-token KLs and of the tokens' log-ratios, (completions,) each."""
    policy, reference = (scorer.logits(batch) for scorer in scorers)
    sizes = [logits(slice(0, 1)).shape[-1] for logits in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`reference` must have the policy's vocabulary of {sizes[0]} tokens, got {sizes[1]}; "
            "resize the embeddings of neither or of both"
        )
    divergences, logratios = [], []
    step = max(1, chunk_elements // sizes[0])
    for start in range(0, len(batch.completion_ids), step):
        piece = slice(start, start + step)
        log_p = policy(piece).log_softmax(-1)
        difference = log_p - reference(piece).to(log_p.device).log_softmax(-1)
        targets = batch.completion_ids[piece].to(log_p.device)
        logratios.append(difference.gather(-1, targets[:, None]).squeeze(-1).cpu())
        # A token that the policy excludes (-inf) adds nothing, though 0 times its difference is NaN.
        terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * difference)
        # A divergence is never negative; rounding makes that of equal distributions about -1e-8.
        divergences.append(terms.sum(-1).clamp(min=0).cpu())
    owner = torch.arange(len(batch)).repeat_interleave(batch.completion_lengths)
    kl, logratio = (
        torch.zeros(len(batch), dtype=torch.float64).index_add(0, owner, torch.cat(parts).double()).float()
        for parts in (divergences, logratios)
    )
    return kl, logratio


def _batch(samples: Sequence[Sample]) -> CompletionBatch:
    prompts = [sample.prompt_ids for sample in samples]
    return CompletionBatch.from_lists(prompts, [[sample.completion_ids] for sample in samples])


def _length(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.completion_ids)
