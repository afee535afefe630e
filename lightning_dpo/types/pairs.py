"""Pairs, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_dpo.types.completions import CompletionBatch, CompletionLogps
from lightning_dpo.types.devices import send
from lightning_dpo.types.numbers import ExactNumbers
from lightning_dpo.types.ragged import flat_ids, flat_masks, lengths_of

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
        margin: By how much the chosen completion's score is above the rejected one's, where the row has it.
        weight: What the pair counts in losses and metrics, where the row has it.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    tools: list[dict[str, Any]] | None = None
    margin: float | None = None
    weight: float | None = None


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
class PairBatch(ExactNumbers):
    """A batch of tokenised pairs, ragged: ids laid end to end, without padding.

    It is scored as prompts with two completions each, see `completions`. Lengths, weights and margins stay on
    the CPU.

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
        margins: By how much each chosen completion's score is above the rejected one's, (batch,), on the CPU;
            None where the data do not say.
        counted: Whether each completion token counts in log-probabilities and lengths, those of every chosen
            completion and then those of every rejected one, (sum of both lengths,) of bool, on the CPU; None
            where all do.
        origins: Number of the named data set that each pair is from, (batch,), on the CPU; None where there
            is one, unnamed.
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
    margins: Tensor | None = None
    counted: Tensor | None = None
    origins: Tensor | None = None

    @classmethod
    def from_pairs(
        cls,
        pairs: Sequence[TokenPair],
        *,
        weights: Sequence[float] | None = None,
        denominator: float | None = None,
        margins: Sequence[float] | None = None,
        counted: Sequence[tuple[Sequence[bool] | None, Sequence[bool] | None]] | None = None,
        origins: Sequence[int] | None = None,
    ) -> PairBatch:
        """Collate token pairs; the collator for a user's own data loader.

        Args:
            pairs: At least one pair; no part of a pair may be empty.
            weights: Weight of each pair; 1 where not given.
            denominator: What the weighted sum of losses is divided by; None means the sum of the weights.
            margins: What each pair says of how much better the chosen completion is, or None.
            counted: For each pair whether each token of its chosen and of its rejected completion counts;
                None for a completion of which all do.
            origins: Number of the named data set that each pair is from, or None.

        Raises:
            ValueError: If `pairs` is empty, or a pair has an empty part, or another argument does not fit the
                pairs.
        """
        if not pairs:
            raise ValueError("`pairs` must hold at least one pair, got none")
        for index, pair in enumerate(pairs):
            if not all(len(part) for part in pair):
                sizes = dict(zip(TokenPair._fields, map(len, pair), strict=True))
                raise ValueError(f"`pairs` must have no empty part, got {sizes} at index {index}")
        further = {"weights": weights, "margins": margins, "counted": counted, "origins": origins}
        for name, values in further.items():
            if values is not None and len(values) != len(pairs):
                raise ValueError(f"`{name}` must have one entry for each of {len(pairs)} pairs, got {values}")
        prompts, chosen, rejected = zip(*pairs, strict=True)
        return cls(
            prompt_ids=flat_ids(prompts),
            chosen_ids=flat_ids(chosen),
            rejected_ids=flat_ids(rejected),
            prompt_lengths=lengths_of(prompts),
            chosen_lengths=lengths_of(chosen),
            rejected_lengths=lengths_of(rejected),
            weights=torch.tensor([1.0] * len(pairs) if weights is None else weights, dtype=torch.float32),
            denominator=denominator,
            margins=None if margins is None else torch.tensor(margins, dtype=torch.float32),
            origins=None if origins is None else torch.tensor(origins),
            counted=None
            if counted is None
            else flat_masks(
                [mask for part in zip(*counted, strict=True) for mask in part], [*chosen, *rejected]
            ),
        )

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.prompt_lengths)

    def to(self, device: torch.device | str) -> PairBatch:
        """Move ids to a device, without waiting for them; lengths, weights and margins stay on the CPU."""
        moved: dict[str, Any] = {n: send(getattr(self, n), device) for n in _IDS}
        leaves = self.prompt_ids.device.type == "cpu" != moved["prompt_ids"].device.type
        return replace(self, **moved, host=self if leaves else self.host)

    def completions(self) -> CompletionBatch:
        """The pairs' prompts with both completions: first every pair's chosen one, then every rejected one.

        Each completion is also scored on as many first tokens that count as the shorter one of its pair has,
        which is what LD-DPO compares (https://arxiv.org/abs/2409.06411).
        """
        both = CompletionBatch(
            prompt_ids=self.prompt_ids,
            completion_ids=torch.cat([self.chosen_ids, self.rejected_ids]),
            prompt_lengths=self.prompt_lengths,
            completion_lengths=torch.cat([self.chosen_lengths, self.rejected_lengths]),
            prompt_of=torch.arange(len(self)).repeat(2),
            counted=self.counted,
            host=None if self.host is None else self.host.completions(),
        )
        shorter = both.counted_lengths.view(2, -1).amin(0).repeat(2)
        return replace(both, common_lengths=both.lengths_with(shorter))

    def chosen_completions(self) -> CompletionBatch:
        """The pairs' prompts with the preferred completion alone, for methods that see no other."""
        return CompletionBatch(
            prompt_ids=self.prompt_ids,
            completion_ids=self.chosen_ids,
            prompt_lengths=self.prompt_lengths,
            completion_lengths=self.chosen_lengths,
            prompt_of=torch.arange(len(self)),
            counted=None if self.counted is None else self.counted[: int(self.chosen_lengths.sum())],
            host=None if self.host is None else self.host.chosen_completions(),
        )

    def pin_memory(self) -> PairBatch:
        """Pin ids, as a data loader does before the copy to a GPU."""
        return replace(self, **{n: getattr(self, n).pin_memory() for n in _IDS})


_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


class PairLogps(NamedTuple):
    """Log-probabilities of a batch of pairs under one model: sums over completion tokens, natural log.

    Only the first four fields are needed by most losses.

    Attributes:
        chosen: log pi(chosen | prompt), (batch,), float32.
        rejected: log pi(rejected | prompt), (batch,), float32.
        chosen_lengths: Tokens of the chosen that count, (batch,).
        rejected_lengths: Tokens of the rejected that count, (batch,).
        chosen_common: The part of `chosen` on its first m = min(|chosen|, |rejected|) tokens, (batch,); for
            LD-DPO (https://arxiv.org/abs/2409.06411).
        rejected_common: The part of `rejected` on its first m tokens, (batch,).
        chosen_confidence: Mean over the chosen tokens of log p_t - log sum_v p_v^2, (batch,), without
            gradient; for WPO (https://arxiv.org/abs/2406.11827).
        rejected_confidence: The same mean over the rejected tokens, (batch,).
        margins: By how much each chosen completion's score is above the rejected one's, (batch,), where the
            data say so: `PairBatch.margins`; of the policy's log-probs alone.
        weights: What each pair counts, (batch,), for losses that take means over pairs themselves; of the
            policy's log-probs alone. None where all count the same.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    chosen_common: Tensor | None = None
    rejected_common: Tensor | None = None
    chosen_confidence: Tensor | None = None
    rejected_confidence: Tensor | None = None
    margins: Tensor | None = None
    weights: Tensor | None = None

    @classmethod
    def of(cls, completions: CompletionLogps) -> PairLogps:
        """Pairs from their completions, in the order that `PairBatch.completions` gives them."""
        fields: list[Any] = []
        for column in completions:
            fields += (None, None) if column is None else column.chunk(2)
        return cls(*fields)

    def detach(self) -> PairLogps:
        """The pairs' numbers without gradient."""
        return self._replace(**{k: v.detach() for k, v in self._asdict().items() if v is not None})

    def select(self, pairs: Tensor) -> PairLogps:
        """The pairs of these indices, (count,)."""
        return self._replace(**{k: v[pairs] for k, v in self._asdict().items() if v is not None})
