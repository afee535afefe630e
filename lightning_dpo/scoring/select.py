"""Which plan is exact for a model: the cheapest way to score it, found by trying it on a small batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lightning_dpo.models.modes import evaluating
from lightning_dpo.models.precision import ComputeType, compute_type, has_slow_bfloat16
from lightning_dpo.models.unwrap import causal_lm
from lightning_dpo.scoring.forward import ScoringPlan
from lightning_dpo.scoring.gathered import run_gathered
from lightning_dpo.scoring.lm_head import find_head
from lightning_dpo.scoring.positions import own_mask_width
from lightning_dpo.scoring.prefix_attention import PREFIX_ATTENTION, prefix_attention
from lightning_dpo.scoring.trial import Trial
from lightning_dpo.scoring.varlen_attention import VARLEN_ATTENTION, has_kernel, varlen_attention

__all__ = [
    "Agreement",
    "LayoutChoice",
    "Selection",
    "register_attention",
    "require_states",
    "select_plan",
    "still_holds",
]

LayoutChoice = Literal["auto", "shared", "concatenated"]

Agreement: TypeAlias = Callable[[float], float]
"""Gives every rank the largest of the numbers that ranks have."""

_log = logging.getLogger(__name__)

FASTEST: dict[str, tuple[str, ...]] = {
    "cuda": (VARLEN_ATTENTION, "flex_attention"),
    "cpu": (PREFIX_ATTENTION,),
}
"""Attention that computes only what is seen, by device, the fastest first. FlexAttention takes what the
kernel for ragged sequences cannot do, and has no backward pass on the CPU."""

_TAKES_MASKS = frozenset({"eager", "sdpa", "flex_attention", PREFIX_ATTENTION, VARLEN_ATTENTION})
"""Attention implementations that rows of several completions may be tried with."""

_EXACT = 1e-4
"""Nats that a token's log-probability may be off where products run in float32."""

_ROUNDING: dict[ComputeType, float] = {"tf32": 1e-2, "float16": 2e-2, "bfloat16": 0.1}
"""Nats that log-probabilities may be off on average where products are rounded: single tokens go further."""

_OF_A_MISTAKE = 0.05
"""Where products are rounded, a difference must also be below this share of what a mistake would make."""

_GRADIENT: dict[ComputeType, float] = {"tf32": 3e-2, "float16": 5e-2, "bfloat16": 0.1}
"""Relative error that the gradients of most tokens may have where products are rounded."""

_EXACT_GRADIENT = 1e-3
"""The same where they run in float32."""


_SLOW_BFLOAT16 = (
    "this processor computes bfloat16 more slowly than float32: --trainer.precision=32-true is faster here"
)


class Selection(NamedTuple):
    """What was found out about a model.

    Attributes:
        plan: How it is scored from now on.
        head_error: Difference of token log-probabilities between the chunked head and the model's own logits,
            nats: the largest where products run in float32, else the mean. None where no head is shown.
        shared_error: The same difference for shared prompts; None where that was not tried.
        reason: Why the plan is not the cheapest one, or an empty string.
        precision: What the model's products run in.
        attention: The attention implementation of a Hugging Face model, or an empty string.
        gradient_error: Relative error of the gradient behind shared prompts: of the whole where products run
            in float32, else of most tokens. Or None.
        passed_over: Faster attention that was tried and is not used, with what is wrong with it.
        advice: What would be faster on this processor, or an empty string.
        device: Type of the device that it was found out on.
        attention_before: What the model ran before, where `attention` is another one.
    """

    plan: ScoringPlan
    head_error: float | None
    shared_error: float | None
    reason: str
    precision: ComputeType = "float32"
    attention: str = ""
    gradient_error: float | None = None
    passed_over: str = ""
    advice: str = ""
    device: str = ""
    attention_before: str = ""

    def __str__(self) -> str:
        """One line for a log: what was chosen, and why."""
        prompts = "once for all their completions" if self.plan.layout == "shared" else "once per completion"
        head = "in chunks" if self.plan.chunked_head else "over all positions"
        attention = f", attention {self.attention}" if self.attention else ""
        attention += f" (not {self.passed_over})" if self.passed_over else ""
        error = self.shared_error if self.plan.layout == "shared" else self.head_error
        found = "" if error is None else f", off by {error:.1g} nats"
        if self.plan.layout == "shared" and self.gradient_error is not None:
            found += f" and gradients by {self.gradient_error:.1g}"
        why = f": {self.reason}" if self.reason else ""
        advice = f"; {self.advice}" if self.advice else ""
        return f"scoring: prompts {prompts}, head {head}{attention}, {self.precision}{found}{why}{advice}"


def select_plan(
    model: nn.Module,
    *,
    layout: LayoutChoice = "auto",
    device: torch.device | None = None,
    may_switch_attention: bool = False,
    is_compiled: bool = False,
    agree: Agreement | None = None,
) -> Selection:
    """Choose how to score a model: by comparing log-probabilities and gradients, not by its name.

    What counts as equal follows from the type that the model computes in, so call this under the precision
    of training. The model is put in eval mode for the trial and left as it was, whatever its attention
    raises. Under sharding every rank must call this.

    Args:
        model: See `lightning_dpo.scoring.forward.score`.
        layout: "auto" takes shared prompts if they are exact for this model and concatenated ones otherwise.
        device: Where the model's inputs go; by default where its parameters are.
        may_switch_attention: Whether a model that runs SDPA may be switched to attention that skips what
            nobody sees: `lightning_dpo.scoring.varlen_attention` or FlexAttention on CUDA,
            `lightning_dpo.scoring.prefix_attention` on the CPU. It stays switched if shared prompts are exact
            with it.
        is_compiled: Whether torch.compile runs the model's blocks, which leave graphs for attention that goes
            piece by piece; FlexAttention, whose masks would be compiled into them, is not tried then.
        agree: Makes one decision of what all ranks find.

    Raises:
        ValueError: If `layout="shared"` and it is not exact for this model.
    """
    options = (layout, device, may_switch_attention, is_compiled, agree or _alone)
    return run_gathered(_select_plan, model, *options, calls=True)


def _select_plan(
    model: nn.Module,
    layout: LayoutChoice,
    device: torch.device | None,
    may_switch_attention: bool,  # noqa: FBT001
    is_compiled: bool,  # noqa: FBT001
    agree: Agreement,
) -> Selection:
    place = device or next(model.parameters()).device
    precision = compute_type(model, device=place)
    if find_head(causal_lm(model)) is None:
        if layout == "shared":
            raise ValueError(
                '`layout="shared"` needs a Hugging Face causal language model, or a network that offers what '
                f'lightning_dpo.models.own asks for, got {type(model).__name__}; use layout="auto"'
            )
        reason = "the model shows nothing but its logits"
        return Selection(ScoringPlan(), None, None, reason, precision, device=place.type)
    with evaluating(model), torch.inference_mode(mode=False):
        faster = _faster(causal_lm(model), place) if may_switch_attention else []
        left_out = [name for name in faster if is_compiled and name == "flex_attention"]
        faster = [name for name in faster if name not in left_out]
        before = _attention_of(causal_lm(model))
        found = _Judge(model, place, precision, agree).select(layout, faster=faster)
    advice = _SLOW_BFLOAT16 if precision == "bfloat16" and has_slow_bfloat16(place) else ""
    attention = _attention_of(causal_lm(model))
    if left_out and attention not in faster:
        reasons = [found.passed_over, *(f"{name}: the blocks are compiled" for name in left_out)]
        found = found._replace(passed_over=", ".join(filter(None, reasons)))
    found = found._replace(attention=attention, advice=advice, device=place.type)
    found = found._replace(attention_before="" if before == attention else before)
    if layout == "shared" and found.plan.layout != "shared":
        raise ValueError(
            f'`layout="shared"` is not exact for {type(causal_lm(model)).__name__}: {found.reason}'
        )
    if found.reason and layout == "auto":
        _log.warning("prompts are computed once per completion, not once per pair: %s", found.reason)
    return found


def still_holds(selection: Selection, model: nn.Module, *, device: torch.device) -> bool:
    """Whether a model computes where and as it did when it was tried; if not, it attends as it did before.

    Call it as `select_plan` is called.

    Args:
        selection: What was found out then.
        model: The same model.
        device: Where its inputs go now.
    """
    same_place = selection.device in ("", device.type)
    if same_place and selection.precision == compute_type(model, device=device):
        return True
    if selection.attention_before:
        lm: Any = causal_lm(model)
        lm.set_attn_implementation(selection.attention_before)
    return False


def require_states(plan: ScoringPlan, policy: nn.Module) -> None:
    """Refuse a policy whose hidden states are not those that its logits come from.

    Raises:
        ValueError: If `select_plan` found them to differ.
    """
    if not plan.chunked_head:
        raise ValueError(
            "`policy` must offer the hidden states that its logits come from, as lightning_dpo.models.own"
            f" says, but those of {type(policy).__name__} give other logits than its forward pass"
        )


class _Verdict(NamedTuple):
    """What came of trying a plan: its error as `Selection` gives it, that of gradients, and what is wrong."""

    error: float | None
    gradient_error: float | None
    problem: str


class _Judge:
    """Tries plans on one model; every rank makes the same tries, since each is decided on by all."""

    def __init__(
        self, model: nn.Module, device: torch.device, precision: ComputeType, agree: Agreement
    ) -> None:
        self._model = model
        self._device = device
        self._precision = precision
        self._agree = agree
        self._limit = _ROUNDING.get(precision, _EXACT)
        made: list[Trial] = []
        error: Exception | None = None
        try:
            made.append(Trial(model, device=device))
        except Exception as caught:
            error = caught
        if agree(float(not made)) > 0:
            raise error or RuntimeError("the model raised in a forward pass on another rank; see its error")
        self._trial = made[0]

    def select(self, layout: LayoutChoice, *, faster: Sequence[str]) -> Selection:
        """Take the cheapest plan that is exact, with the first attention of these under which it is."""
        lm = causal_lm(self._model)
        plan = ScoringPlan(chunked_head=True)
        head = self._verdict(plan)
        if head.problem:
            return self._selection(ScoringPlan(), head, reason=f"its head is not known here ({head.problem})")
        if layout == "concatenated":
            return self._selection(plan, head)
        unfit = _why_no_shared_rows(lm)
        if unfit:
            return self._selection(plan, head, reason=unfit)
        if self._precision in _ROUNDING:
            self._limit = min(self._limit, _OF_A_MISTAKE * self._trial.mistake().mean)
        shared = ScoringPlan("shared", chunked_head=True)
        wrong: list[str] = []
        for attention in faster:
            verdict = self._verdict_under(attention, lm, shared)
            if not verdict.problem:
                return self._selection(shared, head, verdict)._replace(passed_over=", ".join(wrong))
            wrong.append(f"{attention}: {verdict.problem}")
        verdict = self._verdict(shared)
        if verdict.problem:
            reason = f"{type(lm).__name__} does not keep completions apart ({verdict.problem})"
            return self._selection(plan, head, verdict, reason=reason)
        return self._selection(shared, head, verdict)._replace(passed_over=", ".join(wrong))

    def _verdict_under(self, attention: str, lm: Any, plan: ScoringPlan) -> _Verdict:
        """The verdict with another attention, which the model keeps if nothing is wrong with it."""
        before = _attention_of(lm)
        verdict = _Verdict(None, None, "interrupted")
        try:
            lm.set_attn_implementation(attention)
            verdict = self._verdict(plan)
        finally:
            if verdict.problem:
                lm.set_attn_implementation(before)
        return verdict

    def _verdict(self, plan: ScoringPlan) -> _Verdict:
        def error() -> float:
            found = self._trial.difference(plan)
            return found.mean if self._precision in _ROUNDING else found.largest

        def gradient_error() -> float:
            found = self._trial.gradient_error(plan)
            if found is None:
                return -1.0
            return found.of_most if self._precision in _ROUNDING else found.whole

        worst, problem = self._agreed(error, self._limit, "log-probabilities are off by {:.2g} nats")
        if problem or plan.layout != "shared":
            return _Verdict(worst, None, problem)
        limit = _GRADIENT.get(self._precision, _EXACT_GRADIENT)
        gradient, problem = self._agreed(gradient_error, limit, "gradients are off by a share of {:.2g}")
        return _Verdict(worst, None if gradient is None or gradient < 0 else gradient, problem)

    def _agreed(self, measure: Callable[[], float], limit: float, text: str) -> tuple[float | None, str]:
        """The largest error of all ranks, None if it is no number, and what is wrong with it, if anything."""
        mine, raised = math.inf, ""
        try:
            mine = measure()
        except Exception as error:  # compilers and kernels raise what they like
            first = str(error).strip().splitlines()
            raised = f"{type(error).__name__}: {first[0] if first else 'no message'}"
        worst = self._agree(mine)
        found = worst if math.isfinite(worst) else None
        if worst <= limit:
            return found, ""
        elsewhere = "another rank found it to be wrong" if mine <= limit else text.format(worst)
        return found, raised or elsewhere

    def _selection(
        self, plan: ScoringPlan, head: _Verdict, shared: _Verdict | None = None, *, reason: str = ""
    ) -> Selection:
        shared = shared or _Verdict(None, None, "")
        return Selection(
            plan,
            head.error,
            shared.error,
            reason,
            precision=self._precision,
            gradient_error=shared.gradient_error,
        )


def _why_no_shared_rows(lm: Any) -> str:
    """Why a model cannot be given rows of several completions, where that is known without trying."""
    width, attention = own_mask_width(lm), _attention_of(lm)
    # Of models that have other attention too, only the eager one reads it, as GPT-2's in transformers 5.0.
    if width is not None and attention in ("", "eager"):
        return f"attention of {type(lm).__name__} has a mask of its own, of {width} columns"
    if attention and attention not in _TAKES_MASKS:
        # FlashAttention's would be unpadded by a mask of another shape, which leaves CUDA unusable.
        return (
            f"attention {attention} takes no mask that sets completions apart; leave attn_implementation out"
        )
    return ""


def _faster(lm: Any, device: torch.device) -> list[str]:
    """Attention that a model which runs SDPA could be switched to, the fastest first."""
    if not hasattr(lm, "set_attn_implementation") or _attention_of(lm) != "sdpa":
        return []
    register_attention()
    return [name for name in FASTEST.get(device.type, ()) if _can_switch(lm, name)]


def register_attention() -> None:
    """Make this package's attention known to transformers; any number of times."""
    for name, function in ((PREFIX_ATTENTION, prefix_attention), (VARLEN_ATTENTION, varlen_attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)


def _can_switch(lm: Any, implementation: str) -> bool:
    if implementation == "flex_attention":
        return bool(lm._supports_flex_attn)
    if implementation == VARLEN_ATTENTION:
        return has_kernel()
    config = lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    return kinds == {"full_attention"} and getattr(config, "sliding_window", None) is None


def _attention_of(lm: Any) -> str:
    config: Any = getattr(lm, "config", None)
    return str(config.get_text_config()._attn_implementation) if hasattr(config, "get_text_config") else ""


def _alone(number: float) -> float:
    return number
