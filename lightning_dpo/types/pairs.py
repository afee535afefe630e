"""Pairs, prompts with their completions, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "CompletionBatch",
    "CompletionLogps",
    "Message",
    "PairBatch",
    "PairLogps",
    "PreferencePair",
    "TokenPair",
]

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


@dataclass(slots=True)
class CompletionBatch:
    """Prompts and their completions as token ids, ragged: laid end to end, without padding.

    A prompt may have any number of completions: one where feedback is unpaired, two in a pair, more in ranked
    data. How they become rows of a model's input is decided in `lightning_dpo.scoring`, once the model is
    known. Lengths stay on the CPU so that rows are planned without waiting for the device.

    Attributes:
        prompt_ids: Every prompt's token ids, (sum of prompt_lengths,).
        completion_ids: Every completion's token ids, (sum of completion_lengths,).
        prompt_lengths: Tokens of each prompt, (prompts,), on the CPU.
        completion_lengths: Tokens of each completion, (completions,), on the CPU.
        prompt_of: The prompt that each completion answers, (completions,), on the CPU.
        common_lengths: How many of its first tokens each completion is also scored on alone, (completions,),
            on the CPU; None where nobody asks.
        host: The batch as it is on the CPU, for one whose ids are elsewhere.
        laid_out: The batch as rows, for each layout that it was scored in: models of one architecture share
            them.
    """

    prompt_ids: Tensor
    completion_ids: Tensor
    prompt_lengths: Tensor
    completion_lengths: Tensor
    prompt_of: Tensor
    common_lengths: Tensor | None = None
    host: CompletionBatch | None = None
    laid_out: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_lists(
        cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> CompletionBatch:
        """Collate prompts with their completions.

        Args:
            prompts: Token ids of each prompt, at least one each.
            completions: For each prompt its completions' token ids, at least one completion of one token.

        Raises:
            ValueError: If there are no prompts, or one is empty or has no completion, or an empty one.
        """
        if not prompts or len(prompts) != len(completions):
            raise ValueError(
                f"`completions` must have an entry for each prompt, got {len(completions)} for {len(prompts)}"
            )
        for index, (prompt, answers) in enumerate(zip(prompts, completions, strict=True)):
            if not len(prompt) or not answers or not all(map(len, answers)):
                raise ValueError(
                    "`prompts` must have a token each, and `completions` at least one of a token, got "
                    f"{len(prompt)} tokens and {list(map(len, answers))} at index {index}"
                )
        flat = [completion for answers in completions for completion in answers]
        return cls(
            prompt_ids=flat_ids(prompts),
            completion_ids=flat_ids(flat),
            prompt_lengths=lengths_of(prompts),
            completion_lengths=lengths_of(flat),
            prompt_of=torch.arange(len(prompts)).repeat_interleave(lengths_of(completions)),
        )

    def __len__(self) -> int:
        """Number of completions."""
        return len(self.completion_lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CompletionBatch:  # noqa: FBT001
        """Move ids to a device; lengths stay on the CPU."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("prompt_ids", "completion_ids")
        }
        leaves = self.prompt_ids.device.type == "cpu" != moved["prompt_ids"].device.type
        return replace(self, **moved, host=self if leaves else self.host, laid_out={})

    def select(self, prompts: Tensor) -> CompletionBatch:
        """These prompts with all their completions.

        Args:
            prompts: Numbers of prompts in rising order, (count,), on the CPU.
        """
        place = torch.full((len(self.prompt_lengths),), -1)
        place[prompts] = torch.arange(len(prompts))
        kept = (place[self.prompt_of] >= 0).nonzero().squeeze(1)
        return CompletionBatch(
            prompt_ids=pick_ids(self.prompt_ids, self.prompt_lengths, prompts),
            completion_ids=pick_ids(self.completion_ids, self.completion_lengths, kept),
            prompt_lengths=self.prompt_lengths[prompts],
            completion_lengths=self.completion_lengths[kept],
            prompt_of=place[self.prompt_of[kept]],
            common_lengths=None if self.common_lengths is None else self.common_lengths[kept],
        )

    @classmethod
    def join(cls, parts: Sequence[CompletionBatch]) -> CompletionBatch:
        """All prompts of several batches, in order; all of them say common lengths, or none does."""
        firsts = [0]
        for part in parts:
            firsts.append(firsts[-1] + len(part.prompt_lengths))
        common = [part.common_lengths for part in parts if part.common_lengths is not None]
        return cls(
            prompt_ids=torch.cat([part.prompt_ids for part in parts]),
            completion_ids=torch.cat([part.completion_ids for part in parts]),
            prompt_lengths=torch.cat([part.prompt_lengths for part in parts]),
            completion_lengths=torch.cat([part.completion_lengths for part in parts]),
            prompt_of=torch.cat([part.prompt_of + first for part, first in zip(parts, firsts, strict=False)]),
            common_lengths=torch.cat(common) if common else None,
        )


class CompletionLogps(NamedTuple):
    """Log-probabilities of completions under one model: sums over their tokens, natural log.

    Attributes:
        logps: log pi(completion | prompt), (completions,), float32.
        lengths: Tokens of each completion, (completions,).
        common: The part of `logps` on the first `common_lengths` tokens, (completions,), or None.
        confidences: Mean over the completion's tokens of log p_t - log sum_v p_v^2, (completions,), without
            gradient, or None; for WPO (https://arxiv.org/abs/2406.11827).
    """

    logps: Tensor
    lengths: Tensor
    common: Tensor | None = None
    confidences: Tensor | None = None


@dataclass(slots=True)  # not frozen: Lightning's precision plugins set fields of a copy
class PairBatch:
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

    @classmethod
    def from_pairs(
        cls,
        pairs: Sequence[TokenPair],
        *,
        weights: Sequence[float] | None = None,
        denominator: float | None = None,
        margins: Sequence[float] | None = None,
    ) -> PairBatch:
        """Collate token pairs; the collator for a user's own data loader.

        Args:
            pairs: At least one pair; no part of a pair may be empty.
            weights: Weight of each pair; 1 where not given.
            denominator: What the weighted sum of losses is divided by; None means the sum of the weights.
            margins: What each pair says of how much better the chosen completion is, or None.

        Raises:
            ValueError: If `pairs` is empty, or a pair has an empty part, or the weights or margins are not as
                many as the pairs.
        """
        if not pairs:
            raise ValueError("`pairs` must hold at least one pair, got none")
        for index, pair in enumerate(pairs):
            if not all(len(part) for part in pair):
                sizes = dict(zip(TokenPair._fields, map(len, pair), strict=True))
                raise ValueError(f"`pairs` must have no empty part, got {sizes} at index {index}")
        for name, values in (("weights", weights), ("margins", margins)):
            if values is not None and len(values) != len(pairs):
                raise ValueError(
                    f"`{name}` must have one number for each of {len(pairs)} pairs, got {values}"
                )
        prompts, chosen, rejected = zip(*pairs, strict=True)
        return cls(
            prompt_ids=flat_ids(prompts),
            chosen_ids=flat_ids(chosen),
            rejected_ids=flat_ids(rejected),
            prompt_lengths=lengths_of(prompts),
            chosen_lengths=lengths_of(chosen),
            rejected_lengths=lengths_of(rejected),
            weights=torch.ones(len(pairs)) if weights is None else torch.tensor(weights, dtype=torch.float32),
            denominator=denominator,
            margins=None if margins is None else torch.tensor(margins, dtype=torch.float32),
        )

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.prompt_lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:  # noqa: FBT001
        """Move ids to a device; lengths, weights and margins stay on the CPU."""
        moved = {n: getattr(self, n).to(device, non_blocking=non_blocking) for n in _IDS}
        leaves = self.prompt_ids.device.type == "cpu" != moved["prompt_ids"].device.type
        return replace(self, **moved, host=self if leaves else self.host)

    def completions(self) -> CompletionBatch:
        """The pairs' prompts with both completions: first every pair's chosen one, then every rejected one.

        Each completion is also scored on as many first tokens as the shorter one of its pair has, which is
        what LD-DPO compares (https://arxiv.org/abs/2409.06411).
        """
        shorter = torch.minimum(self.chosen_lengths, self.rejected_lengths)
        return CompletionBatch(
            prompt_ids=self.prompt_ids,
            completion_ids=torch.cat([self.chosen_ids, self.rejected_ids]),
            prompt_lengths=self.prompt_lengths,
            completion_lengths=torch.cat([self.chosen_lengths, self.rejected_lengths]),
            prompt_of=torch.arange(len(self)).repeat(2),
            common_lengths=shorter.repeat(2),
            host=None if self.host is None else self.host.completions(),
        )

    def chosen_completions(self) -> CompletionBatch:
        """The pairs' prompts with the preferred completion alone, for methods that see no other."""
        return CompletionBatch(
            prompt_ids=self.prompt_ids,
            completion_ids=self.chosen_ids,
            prompt_lengths=self.prompt_lengths,
            completion_lengths=self.chosen_lengths,
            prompt_of=torch.arange(len(self)),
            host=None if self.host is None else self.host.chosen_completions(),
        )

    def pin_memory(self) -> PairBatch:
        """Pin ids, as a data loader does before the copy to a GPU."""
        return replace(self, **{n: getattr(self, n).pin_memory() for n in _IDS})


_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def flat_ids(parts: Sequence[Sequence[int]]) -> Tensor:
    """The ids of all parts, end to end."""
    return torch.cat([torch.as_tensor(part, dtype=torch.long) for part in parts])


def lengths_of(parts: Sequence[Sequence[Any]]) -> Tensor:
    """How many elements each part has, (parts,)."""
    return torch.tensor([len(part) for part in parts])


def pick_ids(ids: Tensor, lengths: Tensor, numbers: Tensor) -> Tensor:
    """The ids of some parts, end to end.

    Args:
        ids: Ids of all parts, end to end.
        lengths: How many each part has, (parts,).
        numbers: Which parts, (count,).
    """
    parts = torch.split(ids, lengths.tolist())
    return torch.cat([parts[number] for number in numbers.tolist()])


class PairLogps(NamedTuple):
    """Log-probabilities of a batch of pairs under one model: sums over completion tokens, natural log.

    Only the first four fields are needed by most losses.

    Attributes:
        chosen: log pi(chosen | prompt), (batch,), float32.
        rejected: log pi(rejected | prompt), (batch,), float32.
        chosen_lengths: Completion tokens of the chosen, (batch,).
        rejected_lengths: Completion tokens of the rejected, (batch,).
        chosen_common: The part of `chosen` on its first m = min(|chosen|, |rejected|) tokens, (batch,); for
            LD-DPO (https://arxiv.org/abs/2409.06411).
        rejected_common: The part of `rejected` on its first m tokens, (batch,).
        chosen_confidence: Mean over the chosen tokens of log p_t - log sum_v p_v^2, (batch,), without
            gradient; for WPO (https://arxiv.org/abs/2406.11827).
        rejected_confidence: The same mean over the rejected tokens, (batch,).
        margins: By how much each chosen completion's score is above the rejected one's, (batch,), where the
            data say so: `PairBatch.margins`; of the policy's log-probs alone.
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
