"""The baseline of packing: every sequence whole, all of them in one row, and no prompt shared."""

from __future__ import annotations

import torch

from lightning_dpo import DPOModule, PairBatch
from lightning_dpo.types import CompletionBatch, PairLogps
from lightning_dpo.types.ragged import pick_ids

__all__ = ["PackedSequences", "with_own_prompts"]


class PackedSequences(DPOModule):
    """DPOModule whose completions each stand behind a copy of their prompt, in one row without padding.

    Policy and reference each compute both sequences of a pair. Attention, head and all else are DPOModule's,
    so what differs is what sharing prompts saves. Attention copies keys and values once, as DPOModule's does,
    though none is seen twice here.
    """

    def score(self, batch: PairBatch) -> tuple[PairLogps, PairLogps | None, int]:
        completions = with_own_prompts(batch.completions())
        reference = self.reference.logps(completions, plan=self.plan())
        policy = PairLogps.of(self.logps(completions))
        return policy, None if reference is None else PairLogps.of(reference), self.num_tokens(completions)


def with_own_prompts(batch: CompletionBatch) -> CompletionBatch:
    """The same completions, each with a prompt that no other answers."""
    return CompletionBatch(
        prompt_ids=pick_ids(batch.prompt_ids, batch.prompt_lengths, batch.prompt_of),
        completion_ids=batch.completion_ids,
        prompt_lengths=batch.prompt_lengths[batch.prompt_of],
        completion_lengths=batch.completion_lengths,
        prompt_of=torch.arange(len(batch)),
        common_lengths=batch.common_lengths,
        counted=batch.counted,
    )
