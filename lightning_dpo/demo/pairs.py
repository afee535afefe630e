"""Preference pairs sampled from a model and labelled by Bradley-Terry on the true score."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from lightning_dpo.demo.grammar import PROMPTS, score
from lightning_dpo.demo.model import MAX_NEW_TOKENS
from lightning_dpo.evaluation.sampling import Sample, sample_completions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LabelledPair", "bayes_accuracy", "completion_text", "label", "sample_pairs", "sample_reviews"]

_ROUNDS = 8


class LabelledPair(NamedTuple):
    """Two reviews of one subject, the preferred one first; the fields are the columns of the data files.

    Attributes:
        prompt: One of the grammar's prompts.
        chosen: The preferred review.
        rejected: The other one.
    """

    prompt: str
    chosen: str
    rejected: str

    @property
    def score_gap(self) -> float:
        """True score of the chosen minus that of the rejected, stars; negative where noise won."""
        return score(self.chosen) - score(self.rejected)


def sample_reviews(
    model: nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    seed: int = 0,
    batch_size: int = 256,
) -> list[Sample]:
    """Sample one review for each prompt at temperature 1.

    Args:
        model: The fitted model or a policy trained from it.
        tokenizer: The model's tokenizer.
        prompts: Any of the grammar's prompts; repeat one for several reviews.
        seed: Seeds the samples, as in `lightning_dpo.evaluation.sample_completions`.
        batch_size: Reviews sampled at once.
    """
    special: Any = tokenizer
    return sample_completions(
        model,
        prompts=special(list(prompts))["input_ids"],
        eos_token_id=special.eos_token_id,
        pad_token_id=special.pad_token_id,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=seed,
        batch_size=batch_size,
    )


def completion_text(sample: Sample, *, tokenizer: PreTrainedTokenizerBase) -> str:
    """The words of a completion, without special tokens."""
    return str(tokenizer.decode(list(sample.completion_ids), skip_special_tokens=True))


def label(rng: random.Random, *, prompt: str, reviews: tuple[str, str], scale: float) -> LabelledPair:
    """Choose the preferred review: the first with probability sigmoid(scale * (score_1 - score_2)).

    Bradley-Terry, Eq. 1 of https://arxiv.org/abs/2305.18290, with the reward scale * score.

    Args:
        rng: The source of chance.
        prompt: The prompt that both reviews answer.
        reviews: Two texts.
        scale: Reward per star; the higher, the less noise.
    """
    first, second = reviews
    probability = float(torch.sigmoid(torch.tensor(scale * (score(first) - score(second)))))
    if rng.random() < probability:
        return LabelledPair(prompt, first, second)
    return LabelledPair(prompt, second, first)


def sample_pairs(
    model: nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    scale: float,
    seed: int = 0,
) -> list[LabelledPair]:
    """Sample pairs from a model and label them.

    Prompts take turns. Completions that did not end, or hold special tokens, and pairs of equal texts are
    drawn again.

    Args:
        model: The model that will be the reference: DPO assumes that pairs come from it.
        tokenizer: The model's tokenizer.
        count: Pairs to make.
        scale: Reward per star in the labels, as in `label`.
        seed: Seeds samples and labels.

    Raises:
        RuntimeError: If the model hardly ever ends a review.
    """
    rng = random.Random(seed)
    special = set(tokenizer.all_special_ids)
    pairs: list[LabelledPair] = []
    for _ in range(_ROUNDS):
        turns = range(len(pairs), count)
        prompts = [PROMPTS[turn % len(PROMPTS)] for turn in turns for _ in range(2)]
        samples = sample_reviews(model, tokenizer=tokenizer, prompts=prompts, seed=rng.getrandbits(31))
        usable = [s.finished and not special & set(s.completion_ids[:-1]) for s in samples]
        texts = [completion_text(s, tokenizer=tokenizer) for s in samples]
        for k in range(0, len(samples), 2):
            if usable[k] and usable[k + 1] and texts[k] != texts[k + 1]:
                reviews = (texts[k], texts[k + 1])
                pairs.append(label(rng, prompt=prompts[k], reviews=reviews, scale=scale))
        if len(pairs) == count:
            return pairs
    raise RuntimeError(
        f"only {len(pairs)} of {count} pairs could be sampled in {_ROUNDS} rounds: "
        "the model seldom ends a review; fit it for more steps"
    )


def bayes_accuracy(pairs: Sequence[LabelledPair], *, scale: float) -> float:
    """Expected accuracy of the best possible predictor of the labels: one that knows the true score.

    It predicts the review with the higher score, and is right with probability sigmoid(scale * gap).

    Args:
        pairs: Labelled pairs; which of the two was chosen does not matter.
        scale: Reward per star that the pairs were labelled with.
    """
    gaps = torch.tensor([pair.score_gap for pair in pairs], dtype=torch.float64)
    return float(torch.sigmoid(scale * gaps.abs()).mean())
