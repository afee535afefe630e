"""The language-model head on completion tokens only, in chunks: log-probabilities without full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_dpo.models.own import HiddenStateNetwork
from lightning_dpo.models.precision import autocast_dtype
from lightning_dpo.models.unwrap import causal_lm
from lightning_dpo.scoring.gathered import run_gathered

__all__ = [
    "CHUNK_ELEMENTS",
    "LMHead",
    "TokenLogps",
    "find_head",
    "head_logps",
    "logits_logps",
    "require_head",
]

CHUNK_ELEMENTS = 2**24
"""Logits held at once: 64 MiB in float32, whatever the vocabulary."""


class TokenLogps(NamedTuple):
    """Per-token results, one for each completion token.

    Attributes:
        logps: log p_t of the token, (completion_tokens,), float32.
        confidences: log p_t - log sum_v p_v^2, (completion_tokens,), without gradient, or None.
    """

    logps: Tensor
    confidences: Tensor | None


class LMHead(NamedTuple):
    """How a model turns its last hidden states into logits.

    Attributes:
        module: The output embedding.
        scale: Factor on the logits (Cohere, Granite).
        softcap: c of c * tanh(logits / c), applied after the factor (Gemma 2), or None.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_plain_linear(self) -> bool:
        """Whether the head is a matrix product, which has a backward pass of its own here."""
        # FSDP2 makes a subclass of a module's class; what other subclasses are for changes `forward`.
        return isinstance(self.module, nn.Linear) and type(self.module).forward is nn.Linear.forward

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, (tokens, hidden) -> (tokens, vocab), float32."""
        logits = self.module(hidden).float() * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def find_head(model: nn.Module) -> LMHead | None:
    """Find a model's head: a Hugging Face causal language model's, or the one that a network names.

    None for other modules.

    Whether the result is right for the model at hand is tried out in `lightning_dpo.scoring.select`.
    """
    if isinstance(model, HiddenStateNetwork):
        return LMHead(model.output_head())
    module = getattr(model, "get_output_embeddings", lambda: None)()
    if module is None:
        return None
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    multiplier = getattr(config, "lm_head_multiplier", None)
    return LMHead(
        module,
        scale=(scale or 1.0) * (multiplier or 1.0) / (divisor or 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def require_head(policy: nn.Module, *, use: str) -> nn.Module:
    """The module that maps a policy's last hidden states to logits.

    Args:
        policy: A language model, with an adapter or without.
        use: What is read from the hidden states, for the error.

    Raises:
        ValueError: If the model shows neither.
    """
    head = find_head(causal_lm(policy))
    if head is None:
        raise ValueError(
            f"`policy` must show its last hidden states, which {use} are read from: a Hugging Face causal "
            "language model, or a network that offers what lightning_dpo.models.own asks for; got "
            f"{type(policy).__name__}"
        )
    return head.module


def head_logps(
    hidden: Tensor,
    *,
    head: LMHead,
    targets: Tensor,
    confidence: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> TokenLogps:
    """Log-probability of each target under the head; no tensor of (tokens x vocab) exists at any time.

    Args:
        hidden: Last hidden states at the predicting positions, (completion_tokens, hidden).
        head: The model's head.
        targets: Token ids, (completion_tokens,).
        confidence: Also compute log p_t - log sum_v p_v^2, which WPO needs.
        chunk_elements: Upper bound of the logits that exist at once (at least one token's).
    """
    module = head.module
    if head.is_plain_linear:

        def logps_of(linear: nn.Linear, hidden: Tensor) -> tuple[Tensor, Tensor]:
            chunk = max(1, chunk_elements // linear.weight.shape[0])
            both: tuple[Tensor, Tensor] = _LinearLogps.apply(  # type: ignore[no-untyped-call]
                hidden, linear.weight, linear.bias, targets, head.scale, head.softcap, chunk, confidence
            )
            return both

        logps, confidences = run_gathered(logps_of, module, hidden)
        return TokenLogps(logps, confidences if confidence else None)
    chunk = max(1, chunk_elements // _vocabulary(module))

    def run(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return _select(head.logits(states), ids, confidence)

    parts = [
        checkpoint(run, *piece, use_reentrant=False)
        for piece in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    ]
    logps, confidences = (torch.cat(column) for column in zip(*parts, strict=True))
    return TokenLogps(logps, confidences if confidence else None)


def logits_logps(logits: Tensor, *, predict: Tensor, targets: Tensor, confidence: bool = False) -> TokenLogps:
    """Log-probability of each target from logits that a model returned whole.

    For a user's own network, which hands out nothing but logits.

    Args:
        logits: (rows, seq_len, vocab).
        predict: Flat index of the position that predicts each target, (completion_tokens,); each once.
        targets: Token ids, (completion_tokens,).
        confidence: See `head_logps`.
    """
    flat = logits.flatten(0, 1)
    logps, confidences = _select(flat[predict].float(), targets, confidence)
    return TokenLogps(logps, confidences if confidence else None)


def _vocabulary(module: nn.Module) -> int:
    """Rows of the head's weight; a generous guess for a head without one."""
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, Tensor) else 2**17


def _select(logits: Tensor, targets: Tensor, confidence: bool) -> tuple[Tensor, Tensor]:  # noqa: FBT001
    """Log p of the targets and their confidences, from float32 logits (tokens, vocab)."""
    normaliser = logits.logsumexp(-1)
    logps = logits.gather(-1, targets[:, None]).squeeze(-1) - normaliser
    if not confidence:
        return logps, logps.detach()
    collision = (2 * logits.detach()).logsumexp(-1) - 2 * normaliser.detach()
    return logps, logps.detach() - collision


class _LinearLogps(torch.autograd.Function):
    """Matrix product, softmax and selection in one, chunk by chunk, recomputed in the backward pass.

    The gradient of log p_t with respect to the logits is onehot(t) - softmax(logits); it is formed chunk by
    chunk and folded into the gradients of the hidden states and of the weight at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        chunk: int,
        confidence: bool,  # noqa: FBT001
    ) -> tuple[Tensor, Tensor]:
        dtype = _compute_dtype(hidden)
        matrix = weight.to(dtype)
        states = hidden.to(dtype)
        logits_of = _logits_function(matrix, bias, scale, softcap)
        logps = hidden.new_empty(len(targets), dtype=torch.promote_types(torch.float32, dtype))
        normaliser = torch.empty_like(logps)
        confidences = torch.empty_like(logps)
        for piece in _pieces(len(targets), chunk):
            logits = logits_of(states[piece])
            normaliser[piece] = logits.logsumexp(-1)
            logps[piece] = logits.gather(-1, targets[piece, None]).squeeze(-1) - normaliser[piece]
            if confidence:
                collision = logits.mul_(2).logsumexp(-1) - 2 * normaliser[piece]
                confidences[piece] = logps[piece] - collision
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        ctx.dtype, ctx.scale, ctx.softcap, ctx.chunk = dtype, scale, softcap, chunk
        ctx.mark_non_differentiable(confidences)
        return logps, confidences

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        matrix, states = weight.to(ctx.dtype), hidden.to(ctx.dtype)
        logits_of = _logits_function(matrix, bias, ctx.scale, ctx.softcap)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=normaliser.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=normaliser.dtype) if needs_bias else None
        for piece in _pieces(len(targets), ctx.chunk):
            logits = logits_of(states[piece])
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2
            delta = logits.sub_(normaliser[piece, None]).exp_().mul_(-grad[piece, None])
            delta.scatter_add_(1, targets[piece, None], grad[piece, None].to(delta.dtype))
            if slope is not None:
                delta.mul_(slope)
            delta = delta.mul_(ctx.scale) if ctx.scale != 1.0 else delta
            if grad_bias is not None:
                grad_bias += delta.sum(0)
            delta = delta.to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[piece] = (delta @ matrix).to(hidden.dtype)
            if grad_weight is not None:
                _add_product(grad_weight, delta.T, states[piece])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 5,
        )


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The type matrix products run in: autocast's where it is on, else the hidden states' own."""
    return autocast_dtype(hidden.device) or hidden.dtype


def _logits_function(
    matrix: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Callable[[Tensor], Tensor]:
    """Logits of a chunk in float32 (float64 for float64 weights), whatever type the product runs in."""
    wide = torch.promote_types(torch.float32, matrix.dtype)

    def logits_of(states: Tensor) -> Tensor:
        if states.is_cuda and matrix.dtype in (torch.bfloat16, torch.float16):
            logits = torch.mm(states, matrix.T, out_dtype=torch.float32)
        else:
            logits = (states @ matrix.T).to(wide)
        if bias is not None:
            logits += bias.to(wide)
        if scale != 1.0:
            logits *= scale
        return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)

    return logits_of


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, in place where the types allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _pieces(size: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, size)) for start in range(0, size, chunk)]
