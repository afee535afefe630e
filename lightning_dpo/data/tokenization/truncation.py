"""How long a pair may be, and how a longer one is shortened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from lightning_dpo.types import TokenPair

__all__ = ["LongPairAction", "TokenLimits", "shorten", "truncate"]

LongPairAction: TypeAlias = Literal["truncate", "drop"]


class TokenLimits(NamedTuple):
    """How long a pair may be.

    Attributes:
        max_length: Tokens of the prompt and one completion together, at least 2.
        max_prompt_length: Tokens of the prompt, less than `max_length`; None for no limit of its own.
        on_long: Shorten longer pairs, or leave them out.
    """

    max_length: int = 1024
    max_prompt_length: int | None = None
    on_long: LongPairAction = "truncate"

    def check(self) -> None:
        """Check the limits against each other.

        Raises:
            ValueError: If they leave no room.
        """
        if self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, got {self.max_length}")
        if self.max_prompt_length is not None and not 0 < self.max_prompt_length < self.max_length:
            raise ValueError(
                f"`max_prompt_length` must be at least 1 and less than `max_length` ({self.max_length}), "
                f"got {self.max_prompt_length}"
            )
        if self.on_long not in ("truncate", "drop"):
            raise ValueError(f"`on_long` must be 'truncate' or 'drop', got {self.on_long!r}")


def truncate(pair: TokenPair, limits: TokenLimits, *, keep: int = 0) -> TokenPair:
    """Shorten a pair, see `shorten`.

    Args:
        pair: The whole pair.
        limits: How long it may be.
        keep: Tokens at the start of the prompt that stay: a beginning-of-sequence token.
    """
    completions = (pair.chosen_ids, pair.rejected_ids)
    prompt, (chosen, rejected) = shorten(pair.prompt_ids, completions, limits, keep=keep)
    return TokenPair(prompt, chosen, rejected)


def shorten(
    prompt: Sequence[int], completions: Sequence[Sequence[int]], limits: TokenLimits, *, keep: int = 0
) -> tuple[Sequence[int], list[Sequence[int]]]:
    """Shorten a prompt from the left and its completions from the right, none to nothing.

    The prompt gives way first, down to half of `max_length` (or to `max_prompt_length`); it stays the same
    for all completions. A completion that is cut loses its end-of-sequence token with its end.

    Args:
        prompt: Ids of the whole prompt.
        completions: Ids of each of its completions.
        limits: How long it may be with one of them.
        keep: Tokens at the start of the prompt that stay: a beginning-of-sequence token.

    Returns:
        What is left of the prompt and of its completions.
    """
    size = len(prompt)
    longest = max(map(len, completions))
    most = limits.max_length - 1 if limits.max_prompt_length is None else limits.max_prompt_length
    least = max(1, limits.max_length // 2) if limits.max_prompt_length is None else most
    room = max(least, limits.max_length - longest)
    wanted = min(size, most, room)
    if wanted < size:
        keep = min(keep, wanted - 1)
        prompt = [*prompt[:keep], *prompt[size - wanted + keep :]]
    rest = limits.max_length - wanted
    return prompt, [completion[:rest] for completion in completions]
