"""Judges that see differences in what random models say; a module of its own so that trials can import it."""

from __future__ import annotations

from collections.abc import Sequence


def vowels(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    assert len(prompts) == len(completions)
    return [sum(map(text.lower().count, "aeiou")) - 0.01 * len(text) for text in completions]


def longer(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    return [float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]


class Letter:
    """Counts a letter."""

    def __init__(self, letter: str) -> None:
        self.letter = letter

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        return [float(text.count(self.letter)) for text in completions]
