"""What a policy achieves on the embedded task: true score, KL, held-out accuracy, and the best there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_dpo.demo.grammar import PROMPTS, is_grammatical, score
from lightning_dpo.demo.pairs import LabelledPair, completion_text, sample_reviews
from lightning_dpo.evaluation.frontier import FrontierPoint, best_at_kl
from lightning_dpo.evaluation.kl import Estimate, completion_kl
from lightning_dpo.evaluation.sampling import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Agreement", "Measurement", "agreement", "best_reachable", "measure"]

_BATCH_SIZE = 128


@dataclass(frozen=True, slots=True)
class Measurement:
    """Reviews sampled from a model, and what they show.

    Attributes:
        score: True score, stars.
        kl: KL(model || reference), nats.
        grammatical: Share of the reviews that the grammar can produce.
        prompts: Prompt of each review.
        reviews: The reviews; those of the same index under two models and one seed answer one prompt.
        scores: True score of each review, (samples,), stars.
        logratios: log policy - log reference of each review, (samples,), nats; the policy is the one that
            `measure` was given, whichever model was sampled.
    """

    score: Estimate
    kl: Estimate
    grammatical: float
    prompts: list[str]
    reviews: list[str]
    scores: Tensor
    logratios: Tensor


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a policy's implied rewards agree with held-out labels and with the truth.

    Attributes:
        accuracy: Share of pairs whose chosen review has the higher implied reward; ties count half.
        correlation: Pearson correlation of implied and true reward margins; 0 where one is constant.
    """

    accuracy: float
    correlation: float


def measure(
    policy: nn.Module,
    *,
    reference: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sample_from: str = "policy",
    samples_per_prompt: int = 256,
    seed: int = 0,
) -> Measurement:
    """Sample reviews and score them under policy and reference.

    Args:
        policy: The trained model.
        reference: The model it started from.
        tokenizer: The tokenizer of both models.
        sample_from: "policy", or "reference" for the state before training; the KL is then 0 by definition.
        samples_per_prompt: Reviews of each of the grammar's prompts.
        seed: Seeds the samples.

    Raises:
        ValueError: If `sample_from` is neither.
    """
    if sample_from not in ("policy", "reference"):
        raise ValueError(f'`sample_from` must be "policy" or "reference", got {sample_from!r}')
    prompts = list(PROMPTS) * samples_per_prompt
    model = policy if sample_from == "policy" else reference
    samples = sample_reviews(model, tokenizer=tokenizer, prompts=prompts, seed=seed)
    reviews = [completion_text(sample, tokenizer=tokenizer) for sample in samples]
    scores = torch.tensor([score(review) for review in reviews])
    compared = completion_kl(policy, reference=reference, samples=samples, batch_size=_BATCH_SIZE)
    grammatical = [
        sample.finished and is_grammatical(review, prompt=prompt)
        for sample, review, prompt in zip(samples, reviews, prompts, strict=True)
    ]
    return Measurement(
        score=Estimate.of(scores),
        kl=compared.estimate if sample_from == "policy" else Estimate(0.0, 0.0),
        grammatical=sum(grammatical) / len(grammatical),
        prompts=prompts,
        reviews=reviews,
        scores=scores,
        logratios=compared.logratios,
    )


def agreement(
    policy: nn.Module,
    *,
    reference: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[LabelledPair],
) -> Agreement:
    """Compare implied reward margins with labels and with true score gaps on held-out pairs.

    Neither depends on beta, which only scales the implied rewards.

    Args:
        policy: The trained model.
        reference: The model it started from.
        tokenizer: The tokenizer of both models.
        pairs: Pairs that were not trained on.
    """
    samples = [
        _as_sample(pair.prompt, text, tokenizer) for pair in pairs for text in (pair.chosen, pair.rejected)
    ]
    logratios = completion_kl(
        policy, reference=reference, samples=samples, batch_size=_BATCH_SIZE
    ).logratios.double()
    margins = logratios[0::2] - logratios[1::2]
    gaps = torch.tensor([pair.score_gap for pair in pairs], dtype=torch.float64)
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    correlation = torch.corrcoef(torch.stack([margins, gaps]))[0, 1].nan_to_num(0.0)
    return Agreement(float(right.mean()), float(correlation))


def best_reachable(before: Measurement, after: Measurement) -> FrontierPoint:
    """The highest mean score that any policy can have at the trained policy's KL; its reward is in stars.

    Samples of the reference and of the policy together, weighted as draws from their equal mixture, reach
    further than those of the reference alone. All prompts are pooled, which could only raise the bound: a
    policy cannot choose its prompts.

    Args:
        before: Measured with `sample_from="reference"`.
        after: Measured with `sample_from="policy"`, on as many samples.
    """
    scores = torch.cat([before.scores, after.scores])
    logratios = torch.cat([before.logratios, after.logratios]).double()
    # log pi_ref - log (pi_ref + pi) / 2
    log_weights = -torch.logaddexp(torch.zeros_like(logratios), logratios)
    return best_at_kl(scores, kl=max(after.kl.mean, 1e-6), log_weights=log_weights)


def _as_sample(prompt: str, text: str, tokenizer: Any) -> Sample:
    completion = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Sample(tokenizer(prompt)["input_ids"], [*completion, tokenizer.eos_token_id])
