"""A model and a batch of completions in, log-probabilities out; the LM head never builds full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightning_dpo.models.own import HiddenStateNetwork, model_logits
from lightning_dpo.models.precision import weights_dtype
from lightning_dpo.models.unwrap import causal_lm
from lightning_dpo.scoring.gathered import GATHERED_ENTRY, run_gathered
from lightning_dpo.scoring.layout import InputRows, packed_rows, separate_rows, single_row
from lightning_dpo.scoring.lm_head import TokenLogps, find_head, head_logps, logits_logps
from lightning_dpo.scoring.masks import FLEX_BLOCK, dense_mask, row_masks
from lightning_dpo.scoring.prefix_attention import PREFIX_ATTENTION
from lightning_dpo.scoring.varlen_attention import VARLEN_ATTENTION
from lightning_dpo.types import CompletionBatch, CompletionLogps
from lightning_dpo.types.devices import send

__all__ = [
    "GATHERED_ENTRY",
    "LayoutName",
    "ScoringPlan",
    "TokenStates",
    "completion_logits",
    "completion_logps",
    "completion_states",
    "lay_out",
    "score",
    "score_rows",
    "token_states",
]

LayoutName: TypeAlias = Literal["shared", "concatenated"]


class ScoringPlan(NamedTuple):
    """How a model is scored; `lightning_dpo.scoring.select` finds the cheapest plan that is exact.

    Attributes:
        layout: "shared": prompts are computed once for all their completions; "concatenated": once for each.
        chunked_head: Whether the head runs in chunks on completion tokens; otherwise the model is called for
            its logits.
        confidences: Whether log p_t - log sum_v p_v^2 is computed too, which WPO needs.
    """

    layout: LayoutName = "concatenated"
    chunked_head: bool = False
    confidences: bool = False


class TokenStates(NamedTuple):
    """What a forward pass knows of completion tokens.

    Attributes:
        logps: Log-probability of each token, (completion_tokens,), float32.
        states: Last hidden state before each token, (completion_tokens, hidden), in the type that the model
            computes in.
    """

    logps: Tensor
    states: Tensor


def lay_out(batch: CompletionBatch, *, model: nn.Module, plan: ScoringPlan) -> InputRows:
    """A batch as rows of a model's input; laid out once for all models that run attention alike.

    Args:
        batch: Prompts and completions.
        model: The model that will see the rows.
        plan: How it is scored.
    """
    way = _attention(model) if plan.layout == "shared" else "separate"
    if way not in batch.laid_out:
        batch.laid_out[way] = _lay_out(batch, way)
    rows: InputRows = batch.laid_out[way]
    return rows


def score(model: nn.Module, batch: CompletionBatch, *, plan: ScoringPlan) -> CompletionLogps:
    """Log-probabilities of every completion.

    Args:
        model: A Hugging Face causal language model, or any module that maps (input_ids, attention_mask) to
            logits (rows, seq_len, vocab) or to an object with such `logits`.
        batch: Prompts and completions, on the model's device.
        plan: How to compute them.

    Returns:
        Sums over completion tokens, float32, (completions,) each.
    """
    rows = lay_out(batch, model=model, plan=plan)
    return completion_logps(score_rows(model, rows, plan=plan), batch)


def score_rows(model: nn.Module, rows: InputRows, *, plan: ScoringPlan) -> TokenLogps:
    """Log-probability of every completion token of rows, (completion_tokens,)."""
    if plan.chunked_head:
        return run_gathered(_head_logps, model, rows, plan)
    return run_gathered(_whole_logits_logps, model, rows, plan, calls=True)


def token_states(model: nn.Module, rows: InputRows) -> TokenStates:
    """Log-probabilities of completion tokens, and the hidden states that they come from, in one pass.

    Args:
        model: One whose plan has a chunked head.
        rows: As `lay_out` gives them.
    """
    return run_gathered(_token_states, model, rows)


def completion_states(model: nn.Module, rows: InputRows, *, positions: Tensor) -> Tensor:
    """Last hidden states, which is what the head maps to logits, at some positions of rows.

    Rows with several completions give what single ones would where `select_plan` found shared prompts exact.

    Args:
        model: A Hugging Face causal language model, or a network that offers its hidden states.
        rows: As `lay_out` gives them.
        positions: Flat indices into rows * seq_len, (positions,): `rows.last` for the states that have seen
            whole completions, `rows.predict` for those that have not yet seen the token that they predict.

    Returns:
        (positions, hidden), in the type that the model computes in.
    """
    return run_gathered(_states_at, model, rows, positions)


def completion_logits(model: nn.Module, rows: InputRows, *, plan: ScoringPlan) -> Callable[[slice], Tensor]:
    """The next-token logits at completion positions, made a slice at a time where the plan allows it.

    Returns:
        A function from a slice of the completion tokens to logits (slice, vocab), float32 or wider.
    """
    head = find_head(causal_lm(model)) if plan.chunked_head else None
    if head is None:
        logits = model_logits(model, rows.input_ids, rows.attention_mask).flatten(0, 1)
        return lambda piece: _wide(logits[rows.predict[piece]])
    hidden = _hidden_states(causal_lm(model), rows).flatten(0, 1)[rows.predict]
    return lambda piece: _wide(head.logits(hidden[piece]))


def completion_logps(tokens: TokenLogps, batch: CompletionBatch) -> CompletionLogps:
    """Sum tokens into completions.

    Args:
        tokens: Results of each token that counts, in the order of the batch's completions.
        batch: Says how long completions are, and which tokens count.
    """
    device, lengths = tokens.logps.device, batch.completion_lengths
    counted = slice(None) if batch.counted is None else batch.counted.nonzero().squeeze(1)
    owner = send(torch.arange(len(lengths)).repeat_interleave(lengths)[counted], device)
    counts = send(batch.counted_lengths, device)

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(len(lengths)).index_add(0, owner, values)

    common: Tensor | None = None
    if batch.common_lengths is not None:
        ends = lengths.cumsum(0)
        offsets = torch.arange(int(ends[-1])) - (ends - lengths).repeat_interleave(lengths)
        is_common = (offsets < batch.common_lengths.repeat_interleave(lengths))[counted]
        common = total(tokens.logps * send(is_common, device))
    confidences = None if tokens.confidences is None else total(tokens.confidences) / counts
    return CompletionLogps(total(tokens.logps), counts, common, confidences)


def _head_logps(model: nn.Module, rows: InputRows, plan: ScoringPlan) -> TokenLogps:
    head = find_head(causal_lm(model))
    assert head is not None, "a plan with a chunked head is only made for models that have one"
    return head_logps(
        _states_at(model, rows, rows.predict), head=head, targets=rows.targets, confidence=plan.confidences
    )


def _whole_logits_logps(model: nn.Module, rows: InputRows, plan: ScoringPlan) -> TokenLogps:
    return logits_logps(
        model_logits(model, rows.input_ids, rows.attention_mask),
        predict=rows.predict,
        targets=rows.targets,
        confidence=plan.confidences,
    )


def _token_states(model: nn.Module, rows: InputRows) -> TokenStates:
    head = find_head(causal_lm(model))
    assert head is not None, "a plan with a chunked head is only made for models that have one"
    states = _states_at(model, rows, rows.predict)
    return TokenStates(head_logps(states, head=head, targets=rows.targets).logps, states)


def _states_at(model: nn.Module, rows: InputRows, positions: Tensor) -> Tensor:
    return _hidden_states(causal_lm(model), rows).flatten(0, 1).index_select(0, positions)


def _attention(model: nn.Module) -> str:
    """The attention implementation of a Hugging Face model; a dense mask for a network of the user's own."""
    config: Any = getattr(causal_lm(model), "config", None)
    if not hasattr(config, "get_text_config"):
        return "dense"
    return str(config.get_text_config()._attn_implementation)


def _lay_out(batch: CompletionBatch, way: str) -> InputRows:
    if way == "separate":
        return separate_rows(batch)
    if way in (PREFIX_ATTENTION, VARLEN_ATTENTION):
        return single_row(batch)
    if way == "flex_attention":
        # Of one row, whatever the batch: only its length varies, so that the kernel is not compiled anew.
        return single_row(batch, multiple=FLEX_BLOCK)
    return packed_rows(batch)


def _hidden_states(lm: Any, rows: InputRows) -> Tensor:
    """Last hidden states, (rows, seq_len, hidden), from the model without its head."""
    if isinstance(lm, HiddenStateNetwork):
        return lm.hidden_states(
            rows.input_ids, position_ids=rows.position_ids, attention_mask=dense_mask(rows)
        )
    backbone: Callable[..., Any] = lm.base_model
    if not rows.shared:
        output = backbone(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
    else:
        output = backbone(
            input_ids=rows.input_ids,
            attention_mask=row_masks(rows, config=lm.config.get_text_config(), dtype=weights_dtype(lm)),
            position_ids=rows.position_ids,
            use_cache=False,
        )
    hidden: Tensor = output[0]
    return hidden


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(torch.float32, logits.dtype))
