"""What reinforcement learning learns from: sampled completions and what was thought of their tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dpo.types.completions import CompletionBatch
from lightning_dpo.types.ragged import pick_ids

__all__ = ["Rollout"]


class Rollout(NamedTuple):
    """Completions sampled from the policy, one for each prompt, before it is updated on them.

    Tokens are those of all completions, end to end. Nothing has a gradient.

    Attributes:
        completions: The prompts and what was sampled.
        weights: What each token counts, (tokens,); 0 where a prompt only keeps ranks in step.
        logps: log pi(token) under the policy that sampled, (tokens,), nats.
        reference_logps: The same under the reference, (tokens,), nats.
        values: Value before each token, (tokens,).
        advantages: What to learn from, whitened if that is wanted, (tokens,).
        returns: What the values are fitted to, (tokens,).
        scores: The judge's, less the penalty of a completion that did not end, (completions,).
        finished: Whether the end-of-sequence token was drawn, (completions,) of bool.
    """

    completions: CompletionBatch
    weights: Tensor
    logps: Tensor
    reference_logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    scores: Tensor
    finished: Tensor

    @property
    def kl(self) -> Tensor:
        """Log-ratio to the reference of each completion, whose mean is the KL, (completions,), nats."""
        lengths = self.completions.completion_lengths.tolist()
        parts = torch.split(self.logps - self.reference_logps, lengths)
        return torch.stack([part.sum() for part in parts])

    def select(self, numbers: Tensor) -> Rollout:
        """A minibatch.

        Args:
            numbers: Which completions, in rising order, (count,), on the CPU.
        """
        lengths = self.completions.completion_lengths
        tokens = ("weights", "logps", "reference_logps", "values", "advantages", "returns")
        chosen = numbers.to(self.scores.device)
        return self._replace(
            completions=self.completions.select(numbers),
            scores=self.scores[chosen],
            finished=self.finished[chosen],
            **{name: pick_ids(getattr(self, name), lengths, numbers) for name in tokens},
        )
