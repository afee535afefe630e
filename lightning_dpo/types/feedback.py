"""Unpaired feedback: prompts with one completion each, judged desirable or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dpo.types.completions import CompletionBatch
from lightning_dpo.types.devices import send
from lightning_dpo.types.numbers import ExactNumbers
from lightning_dpo.types.pairs import Message
from lightning_dpo.types.ragged import flat_ids, flat_masks, lengths_of, pick_ids

__all__ = ["Feedback", "FeedbackBatch", "TokenExample"]


@dataclass(frozen=True, slots=True)
class Feedback:
    """One prompt with one completion, and whether that was liked.

    Prompt and completion are both text, or both lists of chat messages.

    Attributes:
        prompt: What the completion answers; may be empty text.
        completion: The answer that was judged.
        label: Whether it is desirable.
        tools: Tool schemas for the chat template, where the row has them.
        weight: What the example counts in losses and metrics, where the row has it.
    """

    prompt: str | list[Message]
    completion: str | list[Message]
    label: bool
    tools: list[dict[str, Any]] | None = None
    weight: float | None = None


class TokenExample(NamedTuple):
    """A judged completion as token ids; the completion carries its end-of-sequence token.

    Attributes:
        prompt_ids: Ids of the prompt, at least one (the first completion token needs a predecessor).
        completion_ids: Ids of the completion, at least one.
        label: Whether the completion is desirable.
    """

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    label: bool


@dataclass(slots=True)  # not frozen: Lightning's precision plugins set fields of a copy
class FeedbackBatch(ExactNumbers):
    """A batch of tokenised prompts with one judged completion each, ragged: ids laid end to end.

    Lengths, labels and weights stay on the CPU.

    Attributes:
        prompt_ids: Every prompt's token ids, (sum of prompt_lengths,).
        completion_ids: Every completion's token ids, (sum of completion_lengths,).
        prompt_lengths: Tokens of each prompt, (batch,), on the CPU.
        completion_lengths: Tokens of each completion, (batch,), on the CPU.
        labels: Whether each completion is desirable, (batch,) of bool, on the CPU.
        partners: The example whose completion is put to each prompt to estimate a KL: the next one,
            cyclically, of another prompt; the example itself where all prompts are the same, (batch,), on
            the CPU.
        weights: Weight of each example in losses and metrics, (batch,), on the CPU; 0 marks a filler that
            makes ranks take equally many steps.
        denominator: What the weighted sum of losses is divided by; None means the sum of the weights.
        host: The batch as it was on the CPU, set when its ids leave.
        counted: Whether each completion token counts in log-probabilities and lengths, (sum of
            completion_lengths,) of bool, on the CPU; None where all do.
        origins: Number of the named data set that each example is from, (batch,), on the CPU; None where
            there is one, unnamed.
    """

    prompt_ids: Tensor
    completion_ids: Tensor
    prompt_lengths: Tensor
    completion_lengths: Tensor
    labels: Tensor
    partners: Tensor
    weights: Tensor
    denominator: float | None = None
    host: FeedbackBatch | None = None
    counted: Tensor | None = None
    origins: Tensor | None = None

    @classmethod
    def from_examples(
        cls,
        examples: Sequence[TokenExample],
        *,
        weights: Sequence[float] | None = None,
        denominator: float | None = None,
        counted: Sequence[Sequence[bool] | None] | None = None,
        origins: Sequence[int] | None = None,
    ) -> FeedbackBatch:
        """Collate token examples; the collator for a user's own data loader.

        Args:
            examples: At least one example; neither part of one may be empty.
            weights: Weight of each example; 1 where not given.
            denominator: See the attribute of this name.
            counted: For each completion whether each of its tokens counts; None for one of which all do.
            origins: Number of the named data set that each example is from, or None.

        Raises:
            ValueError: If `examples` is empty, or an example has an empty part or a label that is none.
        """
        if not examples:
            raise ValueError("`examples` must hold at least one example, got none")
        for index, (prompt, completion, label) in enumerate(examples):
            if not len(prompt) or not len(completion):
                raise ValueError(
                    f"`examples` must have no empty part, got {len(prompt)} prompt and {len(completion)} "
                    f"completion tokens at index {index}"
                )
            if label not in (True, False):
                raise ValueError(
                    f"`examples` must have labels that are true or false, got {label!r} at index {index}"
                )
        prompts, completions, labels = zip(*examples, strict=True)
        return cls(
            prompt_ids=flat_ids(prompts),
            completion_ids=flat_ids(completions),
            prompt_lengths=lengths_of(prompts),
            completion_lengths=lengths_of(completions),
            labels=torch.tensor(labels, dtype=torch.bool),
            partners=_partners(prompts),
            weights=torch.tensor([1.0] * len(examples) if weights is None else weights, dtype=torch.float32),
            denominator=denominator,
            counted=None if counted is None else flat_masks(counted, completions),
            origins=None if origins is None else torch.tensor(origins),
        )

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.prompt_lengths)

    @property
    def mismatch_weights(self) -> Tensor:
        """Weight of each prompt with its partner's completion, (batch,): 0 where that is its own."""
        return self.weights * (self.partners != torch.arange(len(self)))

    def to(self, device: torch.device | str) -> FeedbackBatch:
        """Move ids to a device, without waiting for them; lengths, labels and weights stay on the CPU."""
        moved: dict[str, Any] = {n: send(getattr(self, n), device) for n in _FEEDBACK_IDS}
        leaves = self.prompt_ids.device.type == "cpu" != moved["prompt_ids"].device.type
        return replace(self, **moved, host=self if leaves else self.host)

    def completions(self) -> CompletionBatch:
        """The prompts with the completions that were judged, one each."""
        return CompletionBatch(
            prompt_ids=self.prompt_ids,
            completion_ids=self.completion_ids,
            prompt_lengths=self.prompt_lengths,
            completion_lengths=self.completion_lengths,
            prompt_of=torch.arange(len(self)),
            counted=self.counted,
            host=None if self.host is None else self.host.completions(),
        )

    def mismatched_completions(self) -> CompletionBatch:
        """The prompts with their partners' completions, one each."""
        return CompletionBatch(
            prompt_ids=self.prompt_ids,
            completion_ids=pick_ids(self.completion_ids, self.completion_lengths, self.partners),
            prompt_lengths=self.prompt_lengths,
            completion_lengths=self.completion_lengths[self.partners],
            prompt_of=torch.arange(len(self)),
            counted=None
            if self.counted is None
            else pick_ids(self.counted, self.completion_lengths, self.partners),
            host=None if self.host is None else self.host.mismatched_completions(),
        )

    def all_completions(self) -> CompletionBatch:
        """The prompts with two completions each: first every judged one, then every partner's."""
        judged, mismatched = self.completions(), self.mismatched_completions()
        return replace(
            judged,
            completion_ids=torch.cat([judged.completion_ids, mismatched.completion_ids]),
            completion_lengths=torch.cat([judged.completion_lengths, mismatched.completion_lengths]),
            prompt_of=judged.prompt_of.repeat(2),
            counted=None
            if judged.counted is None or mismatched.counted is None
            else torch.cat([judged.counted, mismatched.counted]),
            host=None if self.host is None else self.host.all_completions(),
        )

    def pin_memory(self) -> FeedbackBatch:
        """Pin ids, as a data loader does before the copy to a GPU."""
        return replace(self, **{n: getattr(self, n).pin_memory() for n in _FEEDBACK_IDS})


_FEEDBACK_IDS = ("prompt_ids", "completion_ids")


def _partners(prompts: Sequence[Sequence[int]]) -> Tensor:
    """For each prompt the next one, cyclically, that is another; itself if there is none, (prompts,)."""
    names = [tuple(map(int, prompt)) for prompt in prompts]
    count = len(names)
    partners = list(range(count))
    # From the back, twice round: where the next prompt is the same, its partner is this one's too.
    for index in reversed(range(2 * count)):
        here, following = index % count, (index + 1) % count
        partners[here] = following if names[following] != names[here] else partners[following]
    same = len(set(names)) == 1
    return torch.arange(count) if same else torch.tensor(partners)
