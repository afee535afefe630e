"""A model and a batch of pairs in, log-probabilities out; the LM head never builds full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightning_dpo.scoring.layout import Rows, concatenated_rows, shared_rows
from lightning_dpo.scoring.lm_head import TokenLogps, find_head, head_logps, logits_logps
from lightning_dpo.scoring.masks import FLEX_BLOCK, row_masks
from lightning_dpo.scoring.prefix_attention import BRANCH_ATTENTION
from lightning_dpo.types import PairBatch, PairLogps

__all__ = [
    "SCORING_ENTRY",
    "LayoutName",
    "ScoringPlan",
    "causal_lm",
    "pair_logps",
    "rows_for",
    "run_rows",
    "score",
    "score_rows",
]

LayoutName: TypeAlias = Literal["shared", "concatenated"]

SCORING_ENTRY = "_lightning_dpo_score_rows"
"""Attribute by which a sharded model gathers the weights that scoring uses without calling the model."""


class ScoringPlan(NamedTuple):
    """How a model is scored; `lightning_dpo.scoring.select.prove` finds the cheapest plan that is exact.

    Attributes:
        layout: "shared": prompts are computed once per pair; "concatenated": once per completion.
        chunked_head: Whether the head runs in chunks on completion tokens; otherwise the model is called for
            its logits.
    """

    layout: LayoutName = "concatenated"
    chunked_head: bool = False


def causal_lm(model: nn.Module) -> nn.Module:
    """The Hugging Face model within an adapter wrapper, or the module itself."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def rows_for(batch: PairBatch, *, model: nn.Module, plan: ScoringPlan) -> Rows:
    """Lay a batch out for a model; policy and reference of one architecture may share the result."""
    if plan.layout == "concatenated":
        return concatenated_rows(batch)
    config: Any = causal_lm(model).config
    implementation = config.get_text_config()._attn_implementation
    if implementation == BRANCH_ATTENTION:
        return shared_rows(batch, single_row=True)
    return shared_rows(batch, multiple=FLEX_BLOCK if implementation == "flex_attention" else 1)


def score(
    model: nn.Module,
    batch: PairBatch,
    *,
    plan: ScoringPlan,
    rows: Rows | None = None,
    confidence: bool = False,
) -> PairLogps:
    """Log-probabilities of both completions of every pair.

    Args:
        model: A Hugging Face causal language model, or any module that maps (input_ids, attention_mask) to
            logits (rows, seq_len, vocab) or to an object with such `logits`.
        batch: The pairs, on the model's device.
        plan: How to lay them out.
        rows: The batch already laid out by `rows_for`.
        confidence: Also compute what WPO needs.

    Returns:
        Sums over completion tokens, float32, (batch,) each.
    """
    rows = rows_for(batch, model=model, plan=plan) if rows is None else rows
    return pair_logps(score_rows(model, rows, plan=plan, confidence=confidence), rows.lengths)


def score_rows(model: nn.Module, rows: Rows, *, plan: ScoringPlan, confidence: bool = False) -> TokenLogps:
    """Log-probability of every completion token of rows, (completion_tokens,)."""
    run: Callable[..., TokenLogps] | None = getattr(model, SCORING_ENTRY, None)
    if run is not None:
        return run(rows, plan=plan, confidence=confidence)
    return run_rows(model, rows, plan=plan, confidence=confidence)


def run_rows(model: nn.Module, rows: Rows, *, plan: ScoringPlan, confidence: bool = False) -> TokenLogps:
    """What `score_rows` does with a model whose weights are at hand."""
    if not plan.chunked_head:
        options = {"use_cache": False} if hasattr(causal_lm(model), "get_output_embeddings") else {}
        output = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, **options)
        logits = output if isinstance(output, Tensor) else output.logits
        return logits_logps(logits, predict=rows.predict, targets=rows.targets, confidence=confidence)
    lm: Any = causal_lm(model)
    head = find_head(lm)
    assert head is not None, "a plan with a chunked head is only made for models that have one"
    hidden = _hidden_states(lm, rows)
    return head_logps(
        hidden.flatten(0, 1).index_select(0, rows.predict),
        head=head,
        targets=rows.targets,
        confidence=confidence,
    )


def pair_logps(tokens: TokenLogps, lengths: Tensor) -> PairLogps:
    """Sum tokens into completions.

    Args:
        tokens: Per-token results, the chosen of every pair and then the rejected of every pair.
        lengths: Tokens of each completion, (2 * batch,), on the CPU.
    """
    device = tokens.logps.device
    chosen, rejected = lengths.chunk(2)
    shorter = torch.minimum(chosen, rejected).repeat(2)
    ends = lengths.cumsum(0)
    offsets = torch.arange(int(ends[-1])) - (ends - lengths).repeat_interleave(lengths)
    in_head = (offsets < shorter.repeat_interleave(lengths)).to(device, non_blocking=True)
    owner = torch.arange(len(lengths)).repeat_interleave(lengths).to(device, non_blocking=True)
    counts = lengths.to(device, non_blocking=True)

    def total(values: Tensor) -> tuple[Tensor, Tensor]:
        sums = values.new_zeros(len(lengths)).index_add(0, owner, values)
        first, second = sums.chunk(2)
        return first, second

    sums, heads = total(tokens.logps), total(tokens.logps * in_head)
    means: tuple[Tensor | None, Tensor | None] = (None, None)
    if tokens.confidences is not None:
        both = torch.cat(total(tokens.confidences)) / counts
        means = (both[: len(chosen)], both[len(chosen) :])
    chosen_counts, rejected_counts = counts.chunk(2)
    return PairLogps(*sums, chosen_counts, rejected_counts, *heads, *means)


def _hidden_states(lm: Any, rows: Rows) -> Tensor:
    """Last hidden states, (rows, seq_len, hidden), from the model without its head."""
    backbone: Callable[..., Any] = lm.base_model
    if not rows.shared:
        output = backbone(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
    else:
        output = backbone(
            input_ids=rows.input_ids,
            attention_mask=row_masks(rows, config=lm.config.get_text_config(), dtype=lm.dtype),
            position_ids=rows.position_ids,
            use_cache=False,
        )
    hidden: Tensor = output[0]
    return hidden
