"""Judges: anything that scores completions of prompts, or says which of two is better."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from lightning_dpo.evaluation.judges.texts import texts_of_samples
from lightning_dpo.evaluation.sampling import Sample

__all__ = [
    "AnyJudge",
    "Judge",
    "PairwiseJudge",
    "SampleJudge",
    "is_pairwise",
    "judge_name",
    "judge_pairs",
    "judge_samples",
    "judge_texts",
]

if TYPE_CHECKING:
    Scores: TypeAlias = Tensor | Sequence[float]
else:
    # jsonargparse finds this one: of a callable with a class as its result it asks for that class.
    Scores = Any

Judge: TypeAlias = Callable[[Sequence[str], Sequence[str]], Scores]
"""Takes prompts and their completions, as texts; gives a score for each, higher is better."""

PairwiseJudge: TypeAlias = Callable[[Sequence[str], Sequence[str], Sequence[str]], Scores]
"""Takes prompts, first answers and second answers, as texts; says for each how likely the first is better:
1 for the first, 0 for the second, 0.5 for a tie."""

AnyJudge: TypeAlias = Judge | PairwiseJudge
"""A judge of either kind; `is_pairwise` tells them apart by what they are called with."""


@runtime_checkable
class SampleJudge(Protocol):
    """A judge that looks at token ids where it can, so that nothing is lost between ids and text."""

    def of_samples(self, samples: Sequence[Sample], *, tokenizer: Any) -> Tensor:
        """A score for each sample, (samples,).

        Args:
            samples: Completions as they were sampled.
            tokenizer: Of the model that was sampled from.
        """


def is_pairwise(judge: Any) -> TypeGuard[PairwiseJudge]:
    """Whether a judge is called with (prompts, first, second), rather than with (prompts, completions).

    Args:
        judge: Any callable; one whose signature cannot be read counts as one of (prompts, completions).

    Raises:
        ValueError: If it needs another number of arguments, or cannot be called.
    """
    if not callable(judge):
        raise ValueError(f"`judge` must be callable, got {type(judge).__name__}")
    try:
        parameters = list(inspect.signature(judge).parameters.values())
    except (TypeError, ValueError):
        return False
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return False
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in by_place if p.default is p.empty]
    if len(needed) not in (2, 3):
        raise ValueError(
            "`judge` must be called with (prompts, completions), or with (prompts, first, second) to see two "
            f"answers at once, got {judge_name(judge)}{inspect.signature(judge)}"
        )
    return len(needed) == 3


def judge_texts(judge: Judge, *, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
    """Ask a judge, and check its answer.

    Args:
        judge: Any callable of (prompts, completions).
        prompts: Text of each prompt.
        completions: Text of each completion, of the same order and number.

    Returns:
        A finite score for each completion, (samples,), float32, on the CPU.

    Raises:
        ValueError: If the judge gives another number of scores, or one that is not finite.
    """
    return _checked(judge(prompts, completions), judge, completions)


def judge_samples(judge: Judge, samples: Sequence[Sample], *, tokenizer: Any) -> Tensor:
    """Scores of sampled completions, (samples,), float32.

    Their texts, without special tokens, are judged; a `SampleJudge` is given the samples themselves.

    Args:
        judge: See `judge_texts`.
        samples: From `lightning_dpo.evaluation.sample_completions`.
        tokenizer: Of the model that was sampled from.

    Raises:
        ValueError: See `judge_texts`.
    """
    prompts, completions = texts_of_samples(samples, tokenizer=tokenizer)
    by_ids: Any = judge
    if isinstance(by_ids, SampleJudge):
        return _checked(by_ids.of_samples(samples, tokenizer=tokenizer), judge, completions)
    return judge_texts(judge, prompts=prompts, completions=completions)


def judge_pairs(
    judge: PairwiseJudge, *, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> Tensor:
    """Ask a pairwise judge in both orders, and average: a preference for a place cancels.

    Args:
        judge: Any callable of (prompts, first, second).
        prompts: Text of each prompt.
        first: Text of one answer to each.
        second: Text of the other.

    Returns:
        How likely the first answer is better, (pairs,), float32, from 0 to 1; 0.5 where the judge's answer
        goes with the place alone.

    Raises:
        ValueError: If the judge gives another number of answers, or one that is not from 0 to 1.
    """
    forward = _checked(judge(prompts, first, second), judge, first)
    backward = _checked(judge(prompts, second, first), judge, second)
    for answers in (forward, backward):
        outside = answers[(answers < 0) | (answers > 1)].tolist()
        if outside:
            raise ValueError(
                "`judge` must say how likely the first answer is better, from 0 to 1 (0.5 is a tie), got "
                f"{outside[0]:g} from {judge_name(judge)}"
            )
    return (forward + 1 - backward) / 2


def judge_name(judge: Any) -> str:
    """What errors and tables call a judge: the function's name, or the class's."""
    name: str = getattr(judge, "__name__", type(judge).__name__)
    return name


def _checked(answer: Any, judge: AnyJudge, completions: Sequence[str]) -> Tensor:
    try:
        scores = torch.as_tensor(answer, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`judge` must give one score for each of {len(completions)} completions, got "
            f"{type(answer).__name__} from {judge_name(judge)}: {error}"
        ) from None
    if scores.shape != (len(completions),):
        raise ValueError(
            f"`judge` must give one score for each of {len(completions)} completions, got "
            f"{judge_name(judge)} giving a result of shape {tuple(scores.shape)}"
        )
    broken = (~scores.isfinite()).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"`judge` must give finite scores, got {float(scores[broken[0]])} from {judge_name(judge)} for "
            f"{len(broken)} of {len(completions)} completions, the first of them {completions[broken[0]]!r}"
        )
    return scores
