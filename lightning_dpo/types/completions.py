"""Prompts with any number of completions each, and the completions' log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dpo.types.devices import send
from lightning_dpo.types.ragged import flat_ids, lengths_of, pick_ids

__all__ = ["CompletionBatch", "CompletionLogps"]


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
        counted: Whether each completion token counts in log-probabilities and lengths, (completion_tokens,)
            of bool, on the CPU; None where all do. At least one of each completion does.
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
    counted: Tensor | None = None
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

    @property
    def counted_lengths(self) -> Tensor:
        """Tokens of each completion that count, (completions,), on the CPU."""
        if self.counted is None:
            return self.completion_lengths
        owner = torch.arange(len(self)).repeat_interleave(self.completion_lengths)
        return torch.zeros(len(self), dtype=torch.long).index_add(0, owner, self.counted.long())

    def lengths_with(self, counts: Tensor) -> Tensor:
        """How many first tokens of each completion hold so many that count, (completions,), on the CPU.

        Args:
            counts: Tokens that count, at least 1 and at most as many as each completion has, (completions,).
        """
        if self.counted is None:
            return counts
        masks = torch.split(self.counted, self.completion_lengths.tolist())
        places = [mask.nonzero()[count - 1] for mask, count in zip(masks, counts.tolist(), strict=True)]
        return torch.cat(places) + 1

    def to(self, device: torch.device | str) -> CompletionBatch:
        """Move ids to a device, without waiting for them; lengths stay on the CPU."""
        moved = {name: send(getattr(self, name), device) for name in ("prompt_ids", "completion_ids")}
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
            counted=None if self.counted is None else pick_ids(self.counted, self.completion_lengths, kept),
        )

    @classmethod
    def join(cls, parts: Sequence[CompletionBatch]) -> CompletionBatch:
        """All prompts of several batches, in order; all of them say common lengths, or none does."""
        firsts = [0]
        for part in parts:
            firsts.append(firsts[-1] + len(part.prompt_lengths))
        common = [part.common_lengths for part in parts if part.common_lengths is not None]
        counted: list[Tensor] = []
        if any(part.counted is not None for part in parts):
            every = [torch.ones(int(part.completion_lengths.sum()), dtype=torch.bool) for part in parts]
            counted = [
                mask if part.counted is None else part.counted
                for part, mask in zip(parts, every, strict=True)
            ]
        return cls(
            prompt_ids=torch.cat([part.prompt_ids for part in parts]),
            completion_ids=torch.cat([part.completion_ids for part in parts]),
            prompt_lengths=torch.cat([part.prompt_lengths for part in parts]),
            completion_lengths=torch.cat([part.completion_lengths for part in parts]),
            prompt_of=torch.cat([part.prompt_of + first for part, first in zip(parts, firsts, strict=False)]),
            common_lengths=torch.cat(common) if common else None,
            counted=torch.cat(counted) if counted else None,
        )


class CompletionLogps(NamedTuple):
    """Log-probabilities of completions under one model: sums over their tokens, natural log.

    Attributes:
        logps: log pi(completion | prompt) over the tokens that count, (completions,), float32.
        lengths: Tokens of each completion that count, (completions,).
        common: The part of `logps` on the first `common_lengths` tokens, (completions,), or None.
        confidences: Mean over the completion's tokens of log p_t - log sum_v p_v^2, (completions,), without
            gradient, or None; for WPO (https://arxiv.org/abs/2406.11827).
    """

    logps: Tensor
    lengths: Tensor
    common: Tensor | None = None
    confidences: Tensor | None = None
