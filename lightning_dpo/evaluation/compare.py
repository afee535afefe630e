"""Two models' answers to the same prompts before a judge: scores, win rates, and what moving cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_dpo.evaluation.judges import (
    AnyJudge,
    is_pairwise,
    judge_pairs,
    judge_samples,
    texts_of_samples,
)
from lightning_dpo.evaluation.kl import Estimate, completion_kl
from lightning_dpo.evaluation.sampling import Sample, end_tokens, sample_completions
from lightning_dpo.evaluation.win_rate import WinRate, length_controlled_win_rate, win_rate
from lightning_dpo.models.adapter_off import AdapterOff

__all__ = ["ComparedAnswers", "Comparison", "compare_models", "compare_samples", "sample_reference"]


class ComparedAnswers(NamedTuple):
    """One answer of each model to one prompt.

    Attributes:
        prompt: Its text, without special tokens.
        policy: The policy's answer.
        reference: The reference's answer.
        policy_tokens: Length of the policy's answer.
        reference_tokens: Length of the reference's answer.
        policy_score: What the judge gives the policy's answer; None of a pairwise judge.
        reference_score: What it gives the reference's answer; None of a pairwise judge.
        win: 1 where the policy's answer wins, 0 where the reference's does, 0.5 for a tie, or in between.
    """

    prompt: str
    policy: str
    reference: str
    policy_tokens: int
    reference_tokens: int
    policy_score: float | None
    reference_score: float | None
    win: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a judge makes of a policy and a reference. Standard errors are over prompts.

    Attributes:
        prompts: Prompts that both answered.
        samples: Answers of each.
        win_rate: Of the policy against the reference.
        length_controlled: The same if answers were of one length.
        policy_score: The judge's mean score; None of a pairwise judge.
        reference_score: Likewise.
        policy_tokens: Length of the answers.
        reference_tokens: Likewise.
        kl: KL(policy || reference), nats per completion; None where it was not measured.
        answers: The i-th answers of both to each prompt.
    """

    prompts: int
    samples: int
    win_rate: WinRate
    length_controlled: WinRate
    policy_score: Estimate | None
    reference_score: Estimate | None
    policy_tokens: Estimate
    reference_tokens: Estimate
    kl: Estimate | None
    answers: list[ComparedAnswers]


def compare_samples(
    judge: AnyJudge,
    *,
    policy_samples: Sequence[Sample],
    reference_samples: Sequence[Sample],
    tokenizer: Any,
    samples_per_prompt: int = 1,
    kl: Tensor | None = None,
) -> Comparison:
    """Judge answers of two models to the same prompts.

    A judge of single completions scores every answer once, and every answer of the policy is held against
    every one of the reference to that prompt. A pairwise judge sees the i-th answers of both, in both orders.

    Args:
        judge: A judge of either kind.
        policy_samples: The policy's answers, those to one prompt in a row.
        reference_samples: The reference's answers to the same prompts, in the same order.
        tokenizer: Of both models.
        samples_per_prompt: Answers of each model to each prompt.
        kl: KL along each of the policy's answers, (samples,), for `Comparison.kl`.

    Raises:
        ValueError: If the answers are not to the same prompts, `samples_per_prompt` does not divide them, or
            the judge's answer is not one (see `judge_texts` and `judge_pairs`).
    """
    count = len(policy_samples)
    if count == 0 or samples_per_prompt < 1 or count % samples_per_prompt:
        raise ValueError(
            f"`samples_per_prompt` must be at least 1 and divide the number of samples, got "
            f"{samples_per_prompt} for {count}"
        )
    asked = [[list(sample.prompt_ids) for sample in each] for each in (policy_samples, reference_samples)]
    if asked[0] != asked[1]:
        raise ValueError(
            "`reference_samples` must answer the prompts of `policy_samples`, one by one in their order, got "
            f"{len(reference_samples)} for {count} or other prompts"
        )
    shape = (-1, samples_per_prompt)
    lengths, reference_lengths = (
        Tensor([len(sample.completion_ids) for sample in each]).view(shape)
        for each in (policy_samples, reference_samples)
    )
    prompts, texts = texts_of_samples(policy_samples, tokenizer=tokenizer)
    _, reference_texts = texts_of_samples(reference_samples, tokenizer=tokenizer)
    scores: tuple[Tensor, Tensor] | None = None
    if is_pairwise(judge):
        wins = judge_pairs(judge, prompts=prompts, first=texts, second=reference_texts).view(shape)
        outcomes, differences = wins, lengths - reference_lengths
    else:
        scorer: Any = judge
        both = judge_samples(scorer, [*policy_samples, *reference_samples], tokenizer=tokenizer)
        scores = (both[:count].view(shape), both[count:].view(shape))
        outcomes = _beats(scores[0][:, :, None], scores[1][:, None, :]).flatten(1)
        differences = (lengths[:, :, None] - reference_lengths[:, None, :]).flatten(1)
        wins = _beats(*scores)
    return Comparison(
        prompts=count // samples_per_prompt,
        samples=count,
        win_rate=win_rate(outcomes),
        length_controlled=length_controlled_win_rate(outcomes, length_differences=differences),
        policy_score=None if scores is None else _over_prompts(scores[0]),
        reference_score=None if scores is None else _over_prompts(scores[1]),
        policy_tokens=_over_prompts(lengths),
        reference_tokens=_over_prompts(reference_lengths),
        kl=None if kl is None else _over_prompts(kl.view(shape)),
        answers=list(_answers(prompts, texts, reference_texts, lengths, reference_lengths, scores, wins)),
    )


def compare_models(
    policy: nn.Module,
    *,
    reference: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    judge: AnyJudge,
    samples_per_prompt: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
) -> Comparison:
    """Sample answers from two models and judge them.

    Args:
        policy: A causal language model, or a module that maps (input_ids, attention_mask) to logits.
        reference: Another over the same vocabulary.
        prompts: Token ids of each prompt; give each prompt once.
        tokenizer: Of both models.
        judge: A judge of either kind.
        samples_per_prompt: Answers of each model to each prompt.
        max_new_tokens: Longest answer.
        temperature: Of the sampling; the KL is measured at 1 alone.
        batch_size: Answers sampled at once.
        seed: Of the policy's answers; the reference's are drawn independently.

    Raises:
        ValueError: If an argument is out of range, or the judge's answer is not one.
    """
    repeated = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    # A policy that was rebuilt from a checkpoint has lost the generation settings of its model's authors.
    ends = {token for model in (policy, reference) for token in end_tokens(tokenizer, model=model)}
    options: dict[str, Any] = {
        "prompts": repeated,
        "eos_token_id": sorted(ends),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "batch_size": batch_size,
    }
    drawn = [
        sample_completions(policy, seed=seed, **options),
        sample_reference(reference, seed=seed + 1, **options),
    ]
    kl = None
    if temperature == 1:
        kl = completion_kl(policy, reference=reference, samples=drawn[0], batch_size=batch_size).kl
    return compare_samples(
        judge,
        policy_samples=drawn[0],
        reference_samples=drawn[1],
        tokenizer=tokenizer,
        samples_per_prompt=samples_per_prompt,
        kl=kl,
    )


def sample_reference(reference: nn.Module, **options: Any) -> list[Sample]:
    """Completions of a reference, in the fast way where it is the base of an adapted model.

    Args:
        reference: Any model, or an `AdapterOff`, which maps ids to logits and does not generate.
        options: For `sample_completions`.
    """
    if not isinstance(reference, AdapterOff):
        return sample_completions(reference, **options)
    with reference.switched_off() as model:
        return sample_completions(model, **options)


def _beats(scores: Tensor, others: Tensor) -> Tensor:
    return (scores > others).double() + 0.5 * (scores == others).double()


def _over_prompts(values: Tensor) -> Estimate:
    """Mean of (prompts, samples), and its standard error over prompts."""
    return Estimate.of(values.double().mean(1))


def _answers(
    prompts: Sequence[str],
    texts: Sequence[str],
    reference_texts: Sequence[str],
    lengths: Tensor,
    reference_lengths: Tensor,
    scores: tuple[Tensor, Tensor] | None,
    wins: Tensor,
) -> Iterator[ComparedAnswers]:
    given = [[None] * len(texts)] * 2 if scores is None else [each.flatten().tolist() for each in scores]
    counts = (each.flatten().int().tolist() for each in (lengths, reference_lengths))
    rows = zip(prompts, texts, reference_texts, *counts, *given, wins.flatten().tolist(), strict=True)
    for row in rows:
        yield ComparedAnswers(*row)
