"""The cheapest way to score a model that is exact, found by trying it on a small batch."""

from __future__ import annotations

import logging
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_dpo.scoring.forward import ScoringPlan, causal_lm, rows_for, score_rows
from lightning_dpo.scoring.lm_head import find_head
from lightning_dpo.scoring.prefix_attention import BRANCH_ATTENTION
from lightning_dpo.types import PairBatch, TokenPair

__all__ = ["LayoutChoice", "Proof", "prove"]

LayoutChoice = Literal["auto", "shared", "concatenated"]

_log = logging.getLogger(__name__)

_LONGEST_WINDOW = {"cpu": 1024, "cuda": 8192}
"""A sliding window up to this is crossed by the proof; longer ones would make it slow."""


class Proof(NamedTuple):
    """What was found out about a model.

    Attributes:
        plan: How it is scored from now on.
        head_error: Largest difference of a token's log-probability between the chunked head and the model's
            own logits, nats; None where the model shows no head.
        shared_error: The same for shared rows; None where not tried.
        reason: Why the plan is not the cheapest one, or an empty string.
    """

    plan: ScoringPlan
    head_error: float | None
    shared_error: float | None
    reason: str


_FASTEST = {"cuda": "flex_attention", "cpu": BRANCH_ATTENTION}
"""Attention that computes only what is seen: FlexAttention has no backward pass on the CPU."""


@torch.no_grad()
def prove(
    model: nn.Module,
    *,
    layout: LayoutChoice = "auto",
    device: torch.device | None = None,
    may_switch_attention: bool = False,
) -> Proof:
    """Choose how to score a model: by comparing log-probabilities on a small batch, not by its name.

    The model is put in eval mode for the trial and left as it was. Under sharding every rank must call this.

    Args:
        model: See `lightning_dpo.scoring.forward.score`.
        layout: "auto" takes shared rows if they are exact for this model and concatenated ones otherwise.
        device: Where the model's inputs go; by default where its parameters are.
        may_switch_attention: Whether a model that runs SDPA may be switched to attention that skips what
            nobody sees: FlexAttention on CUDA, `lightning_dpo.scoring.prefix_attention` on the CPU. It stays
            switched if shared rows are exact with it.

    Raises:
        ValueError: If `layout="shared"` and it is not exact for this model.
    """
    if find_head(causal_lm(model)) is None:
        if layout == "shared":
            raise ValueError(
                '`layout="shared"` needs a Hugging Face causal language model, '
                f'got {type(model).__name__}; use layout="auto"'
            )
        return Proof(ScoringPlan(), None, None, "the model shows nothing but its logits")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        place = device or next(model.parameters()).device
        may_switch = may_switch_attention and layout != "concatenated"
        proof = (_prove_with_fastest(model, place) if may_switch else None) or _prove(model, layout, place)
    finally:
        for module, training in modes.items():
            module.training = training
    if layout == "shared" and proof.plan.layout != "shared":
        raise ValueError(
            f'`layout="shared"` is not exact for {type(causal_lm(model)).__name__}: {proof.reason}'
        )
    if proof.reason and layout == "auto":
        _log.warning("prompts are computed once per completion, not once per pair: %s", proof.reason)
    return proof


def _prove_with_fastest(model: nn.Module, device: torch.device) -> Proof | None:
    """The proof with the device's fastest attention; None, and the model as it was, if that is not exact."""
    lm: Any = causal_lm(model)
    config = lm.config.get_text_config()
    before, fastest = config._attn_implementation, _FASTEST.get(device.type)
    if fastest is None or before != "sdpa" or not _can_switch(lm, fastest):
        return None
    lm.set_attn_implementation(fastest)
    proof = _prove(model, "auto", device)
    if proof.plan.layout == "shared" and _has_gradient(model, _trial_batch(lm, device), proof.plan):
        return proof
    lm.set_attn_implementation(before)
    return None


def _can_switch(lm: Any, implementation: str) -> bool:
    if implementation == "flex_attention":
        return bool(lm._supports_flex_attn)
    config = lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    return kinds == {"full_attention"} and getattr(config, "sliding_window", None) is None


def _has_gradient(model: nn.Module, batch: PairBatch, plan: ScoringPlan) -> bool:
    """Whether the backward pass runs, which is compiled apart from the forward pass."""
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights or any(isinstance(p, DTensor) for p in weights):
        return True
    try:
        with torch.enable_grad():
            torch.autograd.grad(_token_logps(model, batch, plan).sum(), weights[-1:], allow_unused=True)
    except (RuntimeError, ValueError):
        return False
    return True


def _prove(model: nn.Module, layout: LayoutChoice, device: torch.device) -> Proof:
    lm: Any = causal_lm(model)
    batch = _trial_batch(lm, device)
    truth = _token_logps(model, batch, ScoringPlan())
    plan = ScoringPlan(chunked_head=True)
    head_error, error = _compare(model, batch, plan, truth)
    if head_error is None or not _within(head_error, lm.dtype):
        return Proof(
            ScoringPlan(), head_error, None, f"its head is not known here ({error or _off(head_error)})"
        )
    if layout == "concatenated":
        return Proof(plan, head_error, None, "")
    shared = ScoringPlan("shared", chunked_head=True)
    shared_error, error = _compare(model, batch, shared, truth)
    if shared_error is None or not _within(shared_error, lm.dtype):
        kind = type(lm).__name__
        return Proof(
            plan,
            head_error,
            shared_error,
            f"{kind} does not keep branches apart ({error or _off(shared_error)})",
        )
    return Proof(shared, head_error, shared_error, "")


def _trial_batch(lm: Any, device: torch.device) -> PairBatch:
    """Pairs of several lengths, packed two to a row, beyond the model's window where that is affordable."""
    config = lm.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    crossing = window + 8 if window <= _LONGEST_WINDOW.get(device.type, 1024) else 16
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(config.vocab_size, (length,), generator=generator).tolist()

    sizes = [(max(16, crossing), 12, 17), (5, 9, 4), (3, 1, 6)]
    return PairBatch.from_pairs([TokenPair(*(ids(length) for length in parts)) for parts in sizes]).to(device)


def _token_logps(model: nn.Module, batch: PairBatch, plan: ScoringPlan) -> Tensor:
    return score_rows(model, rows_for(batch, model=model, plan=plan), plan=plan).logps


def _compare(
    model: nn.Module, batch: PairBatch, plan: ScoringPlan, truth: Tensor
) -> tuple[float | None, str]:
    """Difference to the truth, or None and what went wrong: a model may refuse a mask or an argument."""
    try:
        difference = (_token_logps(model, batch, plan) - truth).abs()
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    precise = truth.dtype in (torch.float32, torch.float64) and _is_precise(model)
    return float(difference.max() if precise else difference.mean()), ""


def _is_precise(model: nn.Module) -> bool:
    return next(model.parameters()).dtype in (torch.float32, torch.float64)


def _within(error: float, dtype: torch.dtype) -> bool:
    """Largest difference in float32, mean difference in half precision, whose rounding alone reaches 0.03."""
    return error <= (1e-4 if dtype in (torch.float32, torch.float64) else 5e-2)


def _off(error: float | None) -> str:
    return f"log-probabilities are off by {error:.2g} nats"
