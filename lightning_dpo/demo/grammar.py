"""Short reviews from a probabilistic grammar, whose sentiment has a known, exact score.

A review is two to four clauses on aspects of its subject, then a verdict::

    the acting was not very good , the plot felt superb . overall the film was fine , i liked it .

Its score is the sum of its sentiment words' values, each scaled by the modifiers right before it. The score
is defined for any text, so that whatever a model writes can be scored.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Final

__all__ = [
    "MODIFIERS",
    "PROMPTS",
    "SENTIMENT",
    "is_grammatical",
    "sample_review",
    "score",
    "true_score",
    "vocabulary",
]

ADJECTIVES: Final = {
    "superb": 3.0,
    "wonderful": 3.0,
    "great": 2.0,
    "fine": 2.0,
    "good": 1.0,
    "pleasant": 1.0,
    "plain": 0.0,
    "average": 0.0,
    "dull": -1.0,
    "weak": -1.0,
    "poor": -2.0,
    "bad": -2.0,
    "awful": -3.0,
    "dreadful": -3.0,
}
VERBS: Final = {"loved": 3.0, "enjoyed": 2.0, "liked": 1.0, "minded": -1.0, "regretted": -2.0, "hated": -3.0}

SENTIMENT: Final = ADJECTIVES | VERBS
"""Value of each sentiment word, in stars."""

MODIFIERS: Final = {"very": 1.5, "rather": 0.5, "not": -0.5}
"""Factor of each word that modifies the sentiment word after it; each counts once."""

_ASPECTS: Final = {
    "film": ("acting", "plot", "music", "ending"),
    "book": ("plot", "style", "hero", "ending"),
    "hotel": ("room", "staff", "breakfast", "view"),
    "meal": ("soup", "bread", "service", "wine"),
    "concert": ("music", "singer", "sound", "hall"),
    "museum": ("staff", "hall", "guide", "shop"),
    "train": ("seat", "view", "service", "shop"),
    "garden": ("view", "roses", "guide", "pond"),
}
_LINKS: Final = ("was", "felt", "seemed")
_JOINS: Final = (",", "and", "but")
_PHRASES: Final = ("", "very", "rather", "not", "not very")
_PHRASE_WEIGHTS: Final = (10, 3, 3, 3, 1)

PROMPTS: Final = tuple(f"review of the {subject} :" for subject in _ASPECTS)
"""What a review answers, one prompt for each subject."""

_WORD = re.compile(r"[^\W\d_]+")


def score(text: str) -> float:
    """Sentiment of a text: exact, deterministic, and defined for any text.

    The sum over sentiment words of the word's value times the factors of the modifiers that stand right
    before it. A modifier that is repeated there counts once; one before any other word counts nothing. Case
    and punctuation do not matter.

    Args:
        text: A review, or anything else.

    Returns:
        Stars: about 0 on average over the grammar, in multiples of 0.25.
    """
    total = 0.0
    modifiers: set[str] = set()
    for word in _WORD.findall(text.lower()):
        if word in MODIFIERS:
            modifiers.add(word)
            continue
        if word in SENTIMENT:
            value = SENTIMENT[word]
            for modifier in modifiers:
                value *= MODIFIERS[modifier]
            total += value
        modifiers.clear()
    return total


def true_score(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The judge that knows the truth, for whatever takes a `lightning_dpo.evaluation.Judge`.

    Args:
        prompts: Not looked at: a review's score does not depend on its subject.
        completions: Reviews.

    Returns:
        `score` of each completion, stars.
    """
    return [score(completion) for completion in completions]


def sample_review(rng: random.Random, *, prompt: str) -> str:
    """Draw a review from the grammar.

    Args:
        rng: The source of chance.
        prompt: One of `PROMPTS`.

    Returns:
        Words and punctuation separated by single spaces.

    Raises:
        ValueError: If `prompt` is not one of `PROMPTS`.
    """
    subject = _subject(prompt)
    words: list[str] = []
    spoken = set(rng.sample(_ASPECTS[subject], rng.choice((2, 3, 4))))
    aspects = [aspect for aspect in _ASPECTS[subject] if aspect in spoken]
    for position, aspect in enumerate(aspects):
        if position:
            words.append(rng.choice(_JOINS))
        words += ["the", aspect, rng.choice(_LINKS), *_phrase(rng)]
    words += [".", "overall", "the", subject, "was", *_phrase(rng)]
    words += [",", "i", *(["rather"] if rng.random() < 0.2 else []), rng.choice(tuple(VERBS)), "it", "."]
    return " ".join(words)


def is_grammatical(text: str, *, prompt: str) -> bool:
    """Whether the grammar can produce a text for a prompt.

    Args:
        text: Words and punctuation separated by white space.
        prompt: One of `PROMPTS`.

    Raises:
        ValueError: If `prompt` is not one of `PROMPTS`.
    """
    subject = _subject(prompt)
    match = _pattern(subject).fullmatch(" ".join(text.split()))
    if match is None:
        return False
    *aspects, _ = re.findall(r"\bthe (\S+)", text)
    return 2 <= len(aspects) <= 4 and len(set(aspects)) == len(aspects)


def vocabulary() -> list[str]:
    """Every word and sign of prompts and reviews, sorted."""
    words = {"overall", "i", "it", "the", ".", *_LINKS, *_JOINS, *SENTIMENT, *MODIFIERS}
    for subject, aspects in _ASPECTS.items():
        words |= {subject, *aspects}
    for prompt in PROMPTS:
        words |= set(prompt.split())
    return sorted(words)


def _subject(prompt: str) -> str:
    if prompt not in PROMPTS:
        raise ValueError(f"`prompt` must be one of `PROMPTS`, such as {PROMPTS[0]!r}, got {prompt!r}")
    return prompt.split()[-2]


def _phrase(rng: random.Random) -> list[str]:
    """An adjective with its modifiers."""
    modifiers = rng.choices(_PHRASES, weights=_PHRASE_WEIGHTS)[0]
    return [*modifiers.split(), rng.choice(tuple(ADJECTIVES))]


def _pattern(subject: str) -> re.Pattern[str]:
    def either(words: tuple[str, ...] | dict[str, float]) -> str:
        return "(?:" + "|".join(map(re.escape, words)) + ")"

    phrase = rf"(?:{either(tuple(p + ' ' for p in _PHRASES if p))})?{either(ADJECTIVES)}"
    clause = rf"the {either(_ASPECTS[subject])} {either(_LINKS)} {phrase}"
    verdict = rf"overall the {re.escape(subject)} was {phrase} , i (?:rather )?{either(VERBS)} it \."
    return re.compile(rf"{clause}(?: {either(_JOINS)} {clause})* \. {verdict}")
