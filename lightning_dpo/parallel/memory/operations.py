"""Operations of a pass over a batch, counted from a model's sizes."""

from __future__ import annotations

from typing import NamedTuple

from lightning_dpo.parallel.memory.activations import Workload
from lightning_dpo.parallel.memory.shapes import ModelShape
from lightning_dpo.types.choices import Recomputation

__all__ = ["Passes", "forward_operations", "passes"]


class Passes(NamedTuple):
    """A training step in units of one forward pass.

    Attributes:
        reference: The reference's forward pass, 0 or 1.
        body: The policy's blocks in the backward pass.
        head: The policy's head in the backward pass, which computes logits anew in any case.
    """

    reference: int
    body: int
    head: int


def forward_operations(shape: ModelShape, work: Workload, *, pair_tokens: int) -> tuple[float, float]:
    """Operations for a token of one forward pass, in all blocks and in the head.

    Two for each weight that a token is computed with (appendix B of https://arxiv.org/abs/2001.08361), and
    attention over half a pair. The head sees completion tokens only.

    Args:
        shape: The model's.
        work: The batch; `tokens` has prompts once for all their completions.
        pair_tokens: Positions of one pair.
    """
    body = shape.active_parameters - shape.embedding_parameters - shape.head_parameters
    attention = 2 * shape.query * pair_tokens * shape.layers
    return 2 * body + attention, 2 * shape.head_parameters * work.completion_tokens / work.tokens


def passes(*, reference: str, lora: bool, checkpointing: Recomputation) -> Passes:
    """What a step computes: gradients of inputs and, without adapters, of weights cost a pass each.

    Args:
        reference: DPOModule's; one that is cached or missing is not computed.
        lora: Whether adapters train, whose own operations are not counted.
        checkpointing: What is computed again in the backward pass; products only where whole blocks are.
    """
    gradients = 1 if lora else 2
    return Passes(
        reference=int(reference in ("frozen", "adapter")),
        body=gradients + int(checkpointing is True),
        head=gradients + 1,
    )
