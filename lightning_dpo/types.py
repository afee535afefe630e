"""The words every other file speaks: a preference pair, a batch of them, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Message", "PairBatch", "PairLogps", "PreferencePair", "TokenPair"]

Message: TypeAlias = Mapping[str, Any]
"""One chat turn: ``{"role": ..., "content": ..., ...}`` as chat templates take it."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt with the completion that was preferred and the one that was not.

    The three parts are all text, or all lists of chat messages.

    Attributes:
        prompt: What both completions answer; may be empty text.
        chosen: The preferred completion.
        rejected: The other completion.
        tools: Tool schemas for the chat template, where the row has them.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    tools: list[dict[str, Any]] | None = None


class TokenPair(NamedTuple):
    """A preference pair as token ids; each completion carries its end-of-sequence token.

    Attributes:
        prompt_ids: Ids of the prompt, at least one (the first completion token needs a predecessor).
        chosen_ids: Ids of the preferred completion, at least one.
        rejected_ids: Ids of the other completion, at least one.
    """

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]


@dataclass(slots=True)  # not frozen: Lightning's precision plugins set fields of a copy
class PairBatch:
    """A batch of tokenised pairs, ragged: ids laid end to end, without padding.

    How the ids become rows of a model's input is decided in `lightning_dpo.scoring.layout`, once the model is
    known. Lengths and weights stay on the CPU so that rows are planned without waiting for the device.

    Attributes:
        prompt_ids: Every prompt's token ids, (sum of prompt_lengths,).
        chosen_ids: Every preferred completion's token ids, (sum of chosen_lengths,).
        rejected_ids: Every other completion's token ids, (sum of rejected_lengths,).
        prompt_lengths: Tokens of each prompt, (batch,), on the CPU.
        chosen_lengths: Tokens of each preferred completion, (batch,), on the CPU.
        rejected_lengths: Tokens of each other completion, (batch,), on the CPU.
        weights: Weight of each pair in losses and metrics, (batch,), on the CPU; 0 marks a filler that
            makes ranks take equally many steps.
        denominator: What the weighted sum of losses is divided by. None means the sum of the weights. A
            sampler whose batches differ in size sets it so that accumulated batches equal one large batch.
        host: The batch as it was on the CPU, set when its ids leave; whoever needs the ids there need not
            wait for the device.
    """

    prompt_ids: Tensor
    chosen_ids: Tensor
    rejected_ids: Tensor
    prompt_lengths: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    weights: Tensor
    denominator: float | None = None
    host: PairBatch | None = None

    @classmethod
    def from_pairs(
        cls,
        pairs: Sequence[TokenPair],
        *,
        weights: Sequence[float] | None = None,
        denominator: float | None = None,
    ) -> PairBatch:
        """Collate token pairs; the collator for a user's own data loader.

        Args:
            pairs: At least one pair; no part of a pair may be empty.
            weights: Weight of each pair; 1 where not given.
            denominator: See the attribute of this name.

        Raises:
            ValueError: If `pairs` is empty, or a pair has an empty part.
        """
        if not pairs:
            raise ValueError("`pairs` must hold at least one pair, got none")
        for index, pair in enumerate(pairs):
            if not all(len(part) for part in pair):
                sizes = dict(zip(TokenPair._fields, map(len, pair), strict=True))
                raise ValueError(f"`pairs` must have no empty part, got {sizes} at index {index}")
        prompts, chosen, rejected = zip(*pairs, strict=True)
        return cls(
            prompt_ids=_flat(prompts),
            chosen_ids=_flat(chosen),
            rejected_ids=_flat(rejected),
            prompt_lengths=_lengths(prompts),
            chosen_lengths=_lengths(chosen),
            rejected_lengths=_lengths(rejected),
            weights=torch.ones(len(pairs)) if weights is None else torch.tensor(weights, dtype=torch.float32),
            denominator=denominator,
        )

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.prompt_lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:  # noqa: FBT001
        """Move ids to a device; lengths and weights stay on the CPU."""
        moved = {n: getattr(self, n).to(device, non_blocking=non_blocking) for n in _IDS}
        leaves = self.prompt_ids.device.type == "cpu" != moved["prompt_ids"].device.type
        return replace(self, **moved, host=self if leaves else self.host)

    def pin_memory(self) -> PairBatch:
        """Pin ids, as a data loader does before the copy to a GPU."""
        return replace(self, **{n: getattr(self, n).pin_memory() for n in _IDS})


_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def _flat(parts: Sequence[Sequence[int]]) -> Tensor:
    return torch.cat([torch.as_tensor(part, dtype=torch.long) for part in parts])


def _lengths(parts: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([len(part) for part in parts])


class PairLogps(NamedTuple):
    """Log-probabilities of a batch of pairs under one model: sums over completion tokens, natural log.

    Only the first four fields are needed by most losses.

    Attributes:
        chosen: log pi(chosen | prompt), (batch,), float32.
        rejected: log pi(rejected | prompt), (batch,), float32.
        chosen_lengths: Completion tokens of the chosen, (batch,).
        rejected_lengths: Completion tokens of the rejected, (batch,).
        chosen_head: The part of `chosen` on its first m = min(|chosen|, |rejected|) tokens, (batch,);
            for LD-DPO (https://arxiv.org/abs/2409.06411).
        rejected_head: Likewise for the rejected.
        chosen_confidence: Mean over completion tokens of log p_t - log sum_v p_v^2, (batch,), without
            gradient; for WPO (https://arxiv.org/abs/2406.11827).
        rejected_confidence: Likewise for the rejected.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    chosen_head: Tensor | None = None
    rejected_head: Tensor | None = None
    chosen_confidence: Tensor | None = None
    rejected_confidence: Tensor | None = None

    def detach(self) -> PairLogps:
        """The same numbers without gradient."""
        return self._replace(**{k: v.detach() for k, v in self._asdict().items() if v is not None})

    def select(self, pairs: Tensor) -> PairLogps:
        """The pairs of these indices, (count,)."""
        return self._replace(**{k: v[pairs] for k, v in self._asdict().items() if v is not None})
