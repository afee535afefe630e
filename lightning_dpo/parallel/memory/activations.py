"""Bytes that a forward pass keeps for the backward pass, and bytes that the head takes."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_dpo.parallel.memory.shapes import ModelShape
from lightning_dpo.scoring.lm_head import CHUNK_ELEMENTS
from lightning_dpo.types.choices import Recomputation

__all__ = ["Workload", "activation_bytes", "head_bytes", "layer_bytes", "product_bytes"]

_FLOAT = 4


@dataclass(frozen=True)
class Workload:
    """What one device computes in a step, and in which types.

    Attributes:
        tokens: Positions of the rows: prompts once per pair, and both completions.
        completion_tokens: Those of both completions, which the head sees.
        pairs: How many pairs they make up.
        stream: Bytes of a number of the residual stream.
        compute: Bytes of a number in matrix products.
        by_completion: Whether attention goes completion by completion, as on the CPU: it copies the keys and
            values that a rejected completion sees.
    """

    tokens: int
    completion_tokens: int
    pairs: int
    stream: int
    compute: int
    by_completion: bool

    @property
    def casts(self) -> bool:
        """Whether autocast casts the input of every matrix product."""
        return self.stream != self.compute


def layer_bytes(shape: ModelShape, work: Workload) -> int:
    """What a block with gated feed-forward and RMSNorm keeps when its weights train.

    A norm keeps its input and its normalised input, both in float32, which it computes in; its result is kept
    as the input of matrix products: once for each where autocast casts for each anew, else once for all.
    Attention keeps queries, keys, values, its result and that result's copy laid out for the output
    projection; no scores. The feed-forward part keeps the gate before and after its activation, the other
    factor, and the product.
    """
    norm = 2 * _FLOAT * shape.hidden
    if work.stream != _FLOAT:  # the normalised input in the stream's type, which the gain multiplies
        norm = (_FLOAT + work.stream) * shape.hidden
    inputs = (5 if work.casts else 2) * work.compute * shape.hidden
    within = _FLOAT if work.by_completion else work.compute  # the CPU's attention runs in float32
    attention = within * 2 * (shape.query + shape.key) + work.compute * shape.query + _FLOAT * shape.heads
    feed_forward = 4 * work.compute * shape.intermediate
    total = work.tokens * (2 * norm + inputs + attention + feed_forward)
    if work.by_completion:
        rejected = work.completion_tokens // 2
        seen = work.tokens - rejected  # the prompts and one completion of every pair
        width = shape.key if shape.key == shape.query else shape.query  # grouped keys are repeated
        total += 2 * within * seen * width
        total += within * rejected * seen // work.pairs  # the mask, as numbers
    return total


def product_bytes(shape: ModelShape, work: Workload) -> int:
    """What a block gives out of its matrix products and its attention, which runs in float32 on the CPU."""
    within = _FLOAT if work.by_completion else work.compute
    products = shape.query + 2 * shape.key + 2 * shape.hidden + 2 * shape.intermediate
    return work.tokens * (work.compute * products + within * shape.query + _FLOAT * shape.heads)


def activation_bytes(shape: ModelShape, work: Workload, *, checkpointing: Recomputation) -> int:
    """What all blocks keep; with checkpointing their inputs, and all of the one that is computed anew.

    Where it is selective, blocks keep what their products gave, too.
    """
    layer = layer_bytes(shape, work)
    ends = work.tokens * (2 * _FLOAT + work.stream) * shape.hidden  # the last norm and its result
    ends += work.completion_tokens * work.stream * shape.hidden  # states that predict completion tokens
    if checkpointing:
        kept = work.tokens * work.stream * shape.hidden
        if checkpointing == "selective":
            kept += product_bytes(shape, work)
        return ends + layer + shape.layers * kept
    return ends + shape.layers * layer


def head_bytes(shape: ModelShape, work: Workload) -> int:
    """What exists at once of logits: a chunk in float32, a temporary of its size, and cast copies.

    Does not grow with the tokens once they fill a chunk.
    """
    chunk = min(work.completion_tokens * shape.vocabulary, CHUNK_ELEMENTS)
    cast = shape.head_parameters * work.compute if work.casts else 0
    return 2 * _FLOAT * chunk + (chunk * work.compute if work.compute != _FLOAT else 0) + cast


def backward_bytes(shape: ModelShape, work: Workload) -> int:
    """Gradients within one block on the way back: of the feed-forward part, where they are widest."""
    return work.tokens * (3 * work.compute * shape.intermediate + 2 * work.stream * shape.hidden)
