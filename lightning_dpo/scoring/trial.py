"""A small batch that ways of scoring a model are tried on, and what the model gives when asked plainly."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_dpo.models.own import computes_last_logits, model_logits
from lightning_dpo.models.unwrap import causal_lm
from lightning_dpo.scoring.forward import ScoringPlan, lay_out, score_rows
from lightning_dpo.scoring.lm_head import logits_logps
from lightning_dpo.scoring.positions import has_learned_positions
from lightning_dpo.types import CompletionBatch

__all__ = ["Difference", "GradientError", "Trial"]

_SIZES = ((16, 12, 17), (5, 9, 4), (3, 1, 6))
"""Tokens of each trial prompt and of its two completions: of several lengths, packed two to a row."""

_LONGEST_WINDOW = {"cpu": 1024, "cuda": 8192}
"""A sliding window up to this is crossed by the trial; longer ones would make it slow."""

_MOST_ELEMENTS = 2**30
"""Elements of the largest tensor that a trial makes, 2 GiB in bfloat16; a longer window is not crossed."""


_MOST = 0.8
"""Share of the tokens that `GradientError.of_most` is about. Prompts, first and second completions are a
third of the trial's tokens each: whatever is wrong with one kind of them shows."""


class Difference(NamedTuple):
    """How far token log-probabilities are from what a model gives when asked plainly, nats.

    Attributes:
        largest: Of any token; infinite where one is not a number.
        mean: Over all tokens.
    """

    largest: float
    mean: float

    @classmethod
    def of(cls, logps: Tensor, truth: Tensor) -> Difference:
        """The difference of log-probabilities of the same tokens, (completion_tokens,) each."""
        error = (logps - truth).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        return cls(float(error.max()), float(error.mean()))


class GradientError(NamedTuple):
    """How far a gradient is from the plain one, as a share of it.

    Attributes:
        whole: Norm of the difference over the norm.
        of_most: The same of each token by itself, what four of five tokens stay below. Where products are
            rounded, single tokens of a deep model go anywhere: one of 67 was off by its own size in
            SmolLM2-135M under bfloat16, and made the whole 0.23, where four of five were within 0.03.
    """

    whole: float
    of_most: float

    @classmethod
    def of(cls, gradient: Tensor, truth: Tensor) -> GradientError:
        """The error of a gradient by tokens, (tokens, hidden)."""
        size = truth.norm(dim=1)
        error = (gradient - truth).norm(dim=1).nan_to_num(nan=math.inf, posinf=math.inf)
        whole = float(error.norm() / size.norm().clamp(min=1e-30))
        shares = (error / size)[size > 0].sort().values
        if not math.isfinite(whole) or not len(shares):
            return cls(whole, whole)
        return cls(whole, float(shares[math.ceil(_MOST * len(shares)) - 1]))


class Trial:
    """A batch, and what a model gives for it when called for its logits, each completion in its own row.

    No mask of this package takes part in the truth, so that these can be measured by it.

    Attributes:
        batch: Prompts with two completions each, beyond the model's window where that is affordable.
    """

    def __init__(self, model: nn.Module, *, device: torch.device) -> None:
        """Ask a model plainly; under sharding every rank must do so.

        Args:
            model: In eval mode.
            device: Where its inputs go.
        """
        self._model = model
        crossing = _crossing(causal_lm(model), device)
        self._short = _batch(causal_lm(model), 0).to(device)
        self.batch = _batch(causal_lm(model), crossing).to(device) if crossing else self._short
        plainly = partial(_token_logps, model, self._short, ScoringPlan())
        with torch.compiler.set_stance("force_eager"):
            self._short_truth, self._gradient = self._gradient_of(plainly, _seed(self._short))
        self._truth = self._short_truth
        if crossing:
            with torch.no_grad():
                self._truth = torch.cat([self._plain(*sequence) for sequence in _sequences(self.batch)])

    @torch.no_grad()
    def difference(self, plan: ScoringPlan) -> Difference:
        """Between what a plan gives and what the model gave when it was asked plainly.

        Windows are crossed with shared prompts only: those of other rows are the model's own affair.
        """
        batch, truth = (
            (self.batch, self._truth) if plan.layout == "shared" else (self._short, self._short_truth)
        )
        return Difference.of(_token_logps(self._model, batch, plan), truth)

    @torch.no_grad()
    def mistake(self) -> Difference:
        """What it would change if completions saw those before them, which a wrong layout lets them."""
        sequences = _sequences(self._short)
        firsts, seconds = sequences[0::2], sequences[1::2]
        batch = CompletionBatch.from_lists(
            [torch.cat(first).tolist() for first in firsts], [[second.tolist()] for _, second in seconds]
        )
        wrong = _token_logps(self._model, batch.to(self._short.prompt_ids.device), ScoringPlan())
        truth = torch.split(self._short_truth, self._short.completion_lengths.tolist())
        return Difference.of(wrong, torch.cat(truth[1::2]))

    def gradient_error(self, plan: ScoringPlan) -> GradientError | None:
        """Error of the gradient by the embedded tokens, which lies behind every layer's attention.

        Gradients of a token's copies are added up, so that layouts with more or fewer of them compare. No
        weight takes part, so it does not matter which of them train, or which rank holds them.

        Args:
            plan: How the batch is scored.

        Returns:
            None where no embedding is seen at work.
        """
        if self._gradient is None:
            return None
        batch = self._short
        _, mine = self._gradient_of(lambda: _token_logps(self._model, batch, plan), _seed(batch))
        return None if mine is None else GradientError.of(mine, self._gradient)

    def _plain(self, prompt: Tensor, completion: Tensor) -> Tensor:
        """Log-probabilities of a completion's tokens behind its prompt, from the model's own logits."""
        ids = torch.cat([prompt, completion])[None]
        logits = model_logits(self._model, ids, torch.ones_like(ids), last=len(completion) + 1)
        places = torch.arange(len(completion), device=ids.device)
        return logits_logps(logits, predict=places, targets=completion).logps

    def _gradient_of(self, run: Callable[[], Tensor], seed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities, and their weighted sum's gradient by each distinct token, (tokens, hidden)."""
        embedding = _embedding(causal_lm(self._model))
        if embedding is None or _is_fsdp1(self._model):
            with torch.no_grad():
                return run(), None
        seen: list[tuple[Tensor, Tensor]] = []

        def cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_()
            seen.append((args[0] if args else next(iter(kwargs.values())), leaf))
            return leaf

        handle = embedding.register_forward_hook(cut, with_kwargs=True)
        try:
            with torch.enable_grad():
                logps = run()
                leaves = [leaf for _, leaf in seen]
                gradients = torch.autograd.grad((logps * seed).sum(), leaves) if seen else ()
        finally:
            handle.remove()
        tokens = torch.unique(torch.cat([self._short.prompt_ids, self._short.completion_ids]))
        result: Tensor | None = None
        for (ids, _), gradient in zip(seen, gradients, strict=True):
            flat = gradient.flatten(0, -2).float()
            result = flat.new_zeros(len(tokens), flat.shape[1]) if result is None else result
            # Padding is no token of the batch; nothing sees it, so its gradient is 0 wherever it goes.
            place = torch.searchsorted(tokens, ids.flatten()).clamp(max=len(tokens) - 1)
            result.index_add_(0, place, flat)
        return logps.detach(), result


def _batch(lm: Any, crossing: int) -> CompletionBatch:
    """Random prompts with two completions each; the first prompt has at least `crossing` tokens."""
    vocabulary = _vocabulary(lm)
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(vocabulary, (length,), generator=generator).tolist()

    prompts: list[list[int]] = []
    completions: list[list[list[int]]] = []
    for prompt, *lengths in _SIZES:
        prompts.append(ids(prompt if prompts else max(prompt, crossing)))
        completions.append([ids(length) for length in lengths])
    return CompletionBatch.from_lists(prompts, completions)


def _crossing(lm: Any, device: torch.device) -> int:
    """Tokens that reach beyond a model's sliding window; 0 without one, or where that costs too much.

    Nor is a window crossed that is as long as a model's table of positions: rows cannot be longer.
    """
    config = _text_config(lm)
    # GPT-Neo has its own name for it, and applies it to columns, which is wrong where prompts are shared.
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None) or 0
    if not isinstance(window, int) or not 0 < window <= _LONGEST_WINDOW.get(device.type, 1024):
        return 0
    positions = getattr(config, "max_position_embeddings", None) or 0
    if window + 8 + max(_SIZES[0]) > positions > 0 and has_learned_positions(lm, positions):
        return 0
    length = window + 64
    scores = 2 * length**2 * getattr(config, "num_attention_heads", 1)  # of two rows
    logits = (1 if computes_last_logits(lm) else length) * _vocabulary(lm)
    return window + 8 if max(scores, logits) <= _MOST_ELEMENTS else 0


def _sequences(batch: CompletionBatch) -> list[tuple[Tensor, Tensor]]:
    """Each completion's prompt and itself, as ids."""
    prompts = torch.split(batch.prompt_ids, batch.prompt_lengths.tolist())
    completions = torch.split(batch.completion_ids, batch.completion_lengths.tolist())
    return [(prompts[p], part) for p, part in zip(batch.prompt_of.tolist(), completions, strict=True)]


def _seed(batch: CompletionBatch) -> Tensor:
    """A weight for each completion token, all different, so that a swap would show, (completion_tokens,)."""
    return torch.arange(len(batch.completion_ids), device=batch.completion_ids.device).cos()


def _token_logps(model: nn.Module, batch: CompletionBatch, plan: ScoringPlan) -> Tensor:
    batch.laid_out.clear()  # what this model's attention takes may have changed
    return score_rows(model, lay_out(batch, model=model, plan=plan), plan=plan).logps


def _is_fsdp1(model: nn.Module) -> bool:
    """Whether weights are split by torch's older FSDP, which has no backward pass without weights in it."""
    return any(isinstance(part, FullyShardedDataParallel) for part in model.modules())


def _text_config(lm: Any) -> Any:
    config: Any = getattr(lm, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def _vocabulary(lm: nn.Module) -> int:
    """Tokens that a model knows; of a network of the user's own, those of the smallest of its embeddings."""
    config = _text_config(lm)
    if config is not None:
        return int(config.vocab_size)
    sizes = [part.num_embeddings for part in lm.modules() if isinstance(part, nn.Embedding)]
    return min(sizes, default=2)


def _embedding(lm: Any) -> nn.Module | None:
    """What embeds tokens."""
    if _text_config(lm) is not None and hasattr(lm, "get_input_embeddings"):
        module: nn.Module | None = lm.get_input_embeddings()
        return module
    found = [part for part in lm.modules() if isinstance(part, nn.Embedding)]
    return max(found, key=lambda part: part.num_embeddings, default=None)
