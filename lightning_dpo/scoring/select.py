"""Which plan is exact for a model: the cheapest way to score it, found by trying it on a small batch."""

from __future__ import annotations

import logging
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_dpo.models.modes import evaluating
from lightning_dpo.models.unwrap import causal_lm
from lightning_dpo.scoring.forward import ScoringPlan, lay_out, score_rows
from lightning_dpo.scoring.lm_head import find_head
from lightning_dpo.scoring.prefix_attention import PREFIX_ATTENTION, register_prefix_attention
from lightning_dpo.types import CompletionBatch

__all__ = ["LayoutChoice", "Selection", "select_plan"]

LayoutChoice = Literal["auto", "shared", "concatenated"]

_log = logging.getLogger(__name__)

_LONGEST_WINDOW = {"cpu": 1024, "cuda": 8192}
"""A sliding window up to this is crossed by the trial; longer ones would make it slow."""

FASTEST = {"cuda": "flex_attention", "cpu": PREFIX_ATTENTION}
"""Attention that computes only what is seen: FlexAttention has no backward pass on the CPU."""

_TRIAL_SIZES = ((16, 12, 17), (5, 9, 4), (3, 1, 6))
"""Tokens of each trial prompt and of its two completions: of several lengths, packed two to a row."""


class Selection(NamedTuple):
    """What was found out about a model.

    Attributes:
        plan: How it is scored from now on.
        head_error: Largest difference of a token's log-probability between the chunked head and the model's
            own logits, nats; None where the model shows no head.
        shared_error: The same difference for shared prompts; None where that was not tried.
        reason: Why the plan is not the cheapest one, or an empty string.
    """

    plan: ScoringPlan
    head_error: float | None
    shared_error: float | None
    reason: str


@torch.no_grad()
def select_plan(
    model: nn.Module,
    *,
    layout: LayoutChoice = "auto",
    device: torch.device | None = None,
    may_switch_attention: bool = False,
) -> Selection:
    """Choose how to score a model: by comparing log-probabilities on a small batch, not by its name.

    The model is put in eval mode for the trial and left as it was. Under sharding every rank must call this.

    Args:
        model: See `lightning_dpo.scoring.forward.score`.
        layout: "auto" takes shared prompts if they are exact for this model and concatenated ones otherwise.
        device: Where the model's inputs go; by default where its parameters are.
        may_switch_attention: Whether a model that runs SDPA may be switched to attention that skips what
            nobody sees: FlexAttention on CUDA, `lightning_dpo.scoring.prefix_attention` on the CPU. It stays
            switched if shared prompts are exact with it.

    Raises:
        ValueError: If `layout="shared"` and it is not exact for this model.
    """
    if find_head(causal_lm(model)) is None:
        if layout == "shared":
            raise ValueError(
                '`layout="shared"` needs a Hugging Face causal language model, or a network that offers what '
                f'lightning_dpo.models.own asks for, got {type(model).__name__}; use layout="auto"'
            )
        return Selection(ScoringPlan(), None, None, "the model shows nothing but its logits")
    place = device or next(model.parameters()).device
    with evaluating(model):
        may_switch = may_switch_attention and layout != "concatenated"
        found = (_select_with_fastest(model, place) if may_switch else None) or _select(model, layout, place)
    if layout == "shared" and found.plan.layout != "shared":
        raise ValueError(
            f'`layout="shared"` is not exact for {type(causal_lm(model)).__name__}: {found.reason}'
        )
    if found.reason and layout == "auto":
        _log.warning("prompts are computed once per completion, not once per pair: %s", found.reason)
    return found


def _select_with_fastest(model: nn.Module, device: torch.device) -> Selection | None:
    """The selection with the device's fastest attention; if it is not exact None, and the model as it was."""
    lm: Any = causal_lm(model)
    fastest = FASTEST.get(device.type)
    if fastest is None or not hasattr(lm, "set_attn_implementation"):
        return None
    before = lm.config.get_text_config()._attn_implementation
    if before != "sdpa" or not _can_switch(lm, fastest):
        return None
    register_prefix_attention()
    lm.set_attn_implementation(fastest)
    found = _select(model, "auto", device)
    if found.plan.layout == "shared" and _has_gradient(model, _trial_batch(lm, device), found.plan):
        return found
    lm.set_attn_implementation(before)
    return None


def _can_switch(lm: Any, implementation: str) -> bool:
    if implementation == "flex_attention":
        return bool(lm._supports_flex_attn)
    config = lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    return kinds == {"full_attention"} and getattr(config, "sliding_window", None) is None


def _has_gradient(model: nn.Module, batch: CompletionBatch, plan: ScoringPlan) -> bool:
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


def _select(model: nn.Module, layout: LayoutChoice, device: torch.device) -> Selection:
    lm = causal_lm(model)
    batch = _trial_batch(lm, device)
    truth = _token_logps(model, batch, ScoringPlan())
    plan = ScoringPlan(chunked_head=True)
    head_error, error = _compare(model, batch, plan, truth)
    if head_error is None or not _within(head_error, model):
        reason = f"its head is not known here ({error or _off(head_error)})"
        return Selection(ScoringPlan(), head_error, None, reason)
    if layout == "concatenated":
        return Selection(plan, head_error, None, "")
    shared = ScoringPlan("shared", chunked_head=True)
    shared_error, error = _compare(model, batch, shared, truth)
    if shared_error is None or not _within(shared_error, model):
        reason = f"{type(lm).__name__} does not keep completions apart ({error or _off(shared_error)})"
        return Selection(plan, head_error, shared_error, reason)
    return Selection(shared, head_error, shared_error, "")


def _trial_batch(lm: Any, device: torch.device) -> CompletionBatch:
    """Prompts with two completions of several lengths, beyond the model's window where that is affordable."""
    config = lm.config.get_text_config() if hasattr(getattr(lm, "config", None), "get_text_config") else None
    window = getattr(config, "sliding_window", None) or 0
    crossing = window + 8 if window <= _LONGEST_WINDOW.get(device.type, 1024) else 16
    vocabulary = config.vocab_size if config is not None else _vocabulary(lm)
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(vocabulary, (length,), generator=generator).tolist()

    prompts: list[list[int]] = []
    completions: list[list[list[int]]] = []
    for prompt, *lengths in _TRIAL_SIZES:
        prompts.append(ids(max(prompt, crossing) if not prompts else prompt))
        completions.append([ids(length) for length in lengths])
    return CompletionBatch.from_lists(prompts, completions).to(device)


def _vocabulary(network: nn.Module) -> int:
    """Tokens that a network of the user's own knows: no more than the smallest of its embeddings."""
    sizes = [part.num_embeddings for part in network.modules() if isinstance(part, nn.Embedding)]
    return min(sizes, default=2)


def _token_logps(model: nn.Module, batch: CompletionBatch, plan: ScoringPlan) -> Tensor:
    return score_rows(model, lay_out(batch, model=model, plan=plan), plan=plan).logps


def _compare(
    model: nn.Module, batch: CompletionBatch, plan: ScoringPlan, truth: Tensor
) -> tuple[float | None, str]:
    """Difference to the truth, or None and what went wrong: a model may refuse a mask or an argument."""
    try:
        difference = (_token_logps(model, batch, plan) - truth).abs()
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return float(difference.max() if _is_precise(model) else difference.mean()), ""


def _is_precise(model: nn.Module) -> bool:
    return next(model.parameters()).dtype in (torch.float32, torch.float64)


def _within(error: float, model: nn.Module) -> bool:
    """Largest difference in float32, mean difference in half precision, whose rounding alone reaches 0.03."""
    return error <= (1e-4 if _is_precise(model) else 5e-2)


def _off(error: float | None) -> str:
    return f"log-probabilities are off by {error:.2g} nats"
