"""A training method of one's own: supervised fine-tuning on the chosen completions.

Everything but the loss comes from `PolicyModule`: the policy whole, sharded or with an adapter, the chunked
head, clipping, exact resumption, export and sweeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_dpo.training.base import PolicyModule
from lightning_dpo.training.step_output import StepOutput
from lightning_dpo.types import PairBatch


class SFTModule(PolicyModule):
    """Maximises the likelihood of the chosen completions; the rejected ones are not read."""

    metric_names = ("loss", "perplexity")

    def __init__(self, policy: str | nn.Module, *, token_weighted: bool = False, **kwargs: Any) -> None:
        """Say what to train.

        Args:
            policy: See `PolicyModule`.
            token_weighted: Let every token count the same, in place of every completion.
            kwargs: For `PolicyModule`.
        """
        super().__init__(policy, **kwargs)
        self.token_weighted = token_weighted

    def step(self, batch: PairBatch) -> StepOutput:
        """Negative log-likelihood per token of each chosen completion."""
        completions = batch.chosen_completions()
        scored = self.logps(completions)
        lengths = scored.lengths.to(scored.logps.dtype)
        losses = -scored.logps / (lengths.mean() if self.token_weighted else lengths)
        perplexities = torch.exp(-scored.logps / lengths)
        return StepOutput.of(
            losses,
            batch,
            statistics={"loss": losses, "perplexity": perplexities},
            num_tokens=self.num_tokens(completions),
        )
