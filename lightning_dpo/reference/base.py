"""Where reference log-probabilities come from: a frozen model, the policy without its adapter, or nowhere."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_dpo.scoring.forward import ScoringPlan, causal_lm, score
from lightning_dpo.scoring.layout import Rows
from lightning_dpo.scoring.lm_head import find_head
from lightning_dpo.types import PairBatch, PairLogps

__all__ = ["AdapterReference", "FrozenReference", "NoReference", "Reference", "evaluating"]


class Reference(ABC):
    """A source of reference log-probabilities. Not an nn.Module, so no trainer finds weights in it.

    Attributes:
        can_update: Whether the reference has weights of its own that may follow the policy, as TR-DPO wants
            (https://arxiv.org/abs/2404.09656). Not so where log-probabilities are kept.
    """

    can_update: bool = False

    @abstractmethod
    def logps(
        self, batch: PairBatch, *, rows: Rows, plan: ScoringPlan, confidence: bool = False
    ) -> PairLogps | None:
        """Log-probabilities of the batch, without gradient; None where there is no reference.

        Args:
            batch: The pairs.
            rows: The same pairs laid out, as the policy sees them.
            plan: How `rows` were made.
            confidence: Also compute what LD-DPO and WPO need of the reference.
        """

    @property
    def model(self) -> nn.Module | None:
        """The reference's own weights, where it has any."""
        return None

    @property
    def identity(self) -> str | None:
        """Which weights the reference has, where that is known without looking at them."""
        return None

    @property
    def disagreement(self) -> str:
        """What likely explains that the policy disagrees at the start, if no weights can be compared."""
        return "the adapter does not start at zero; the policy must be a fresh adapter on the base weights"

    def match(self, policy: nn.Module) -> None:  # noqa: B027 (a reference without weights has nothing to do)
        """Follow the policy to its device and type, which the trainer sets after construction."""


class FrozenReference(Reference):
    """A model of its own, in eval mode for good."""

    can_update = True

    def __init__(self, model: nn.Module, *, policy: nn.Module, name: str = "reference") -> None:
        """Freeze a model as the reference.

        Args:
            model: The reference; frozen and put in eval mode in place.
            policy: The model it is compared with.
            name: What errors call it.

        Raises:
            ValueError: If the two have different vocabularies or architectures.
        """
        ours, theirs = _vocabulary(policy), _vocabulary(model)
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(
                f"`reference` must share the policy's vocabulary of {ours} tokens, got {theirs} ({name}); "
                "pass a model with the same tokenizer"
            )
        kinds = type(causal_lm(policy)), type(causal_lm(model))
        if kinds[0] is not kinds[1]:
            # What is proved exact for the policy's layout of rows would be taken for granted here.
            raise ValueError(
                f"`reference` must have the policy's architecture, {kinds[0].__name__}, got "
                f"{kinds[1].__name__} ({name}); pass the model that the policy started from"
            )
        self._model = model.eval().requires_grad_(False)

    @classmethod
    def copy_of(cls, policy: nn.Module) -> FrozenReference:
        """A copy of the policy as it is now."""
        return cls(copy.deepcopy(policy), policy=policy)

    @property
    def model(self) -> nn.Module:
        """The frozen model."""
        return self._model

    def match(self, policy: nn.Module) -> None:
        """Move to the policy's device and floating-point type, and run attention as it does."""
        parameter = next(policy.parameters())
        self._model.to(device=parameter.device, dtype=parameter.dtype)
        ours, theirs = causal_lm(policy), causal_lm(self._model)
        if isinstance(ours, PreTrainedModel) and isinstance(theirs, PreTrainedModel):
            implementation = ours.config.get_text_config()._attn_implementation
            if theirs.config.get_text_config()._attn_implementation != implementation:
                theirs.set_attn_implementation(implementation)

    @torch.no_grad()
    def logps(
        self, batch: PairBatch, *, rows: Rows, plan: ScoringPlan, confidence: bool = False
    ) -> PairLogps:
        """One forward pass of the frozen model."""
        if self._model.training:  # a reference that is saved is part of the module, which has its mode set
            self._model.eval()
        return score(self._model, batch, plan=plan, rows=rows, confidence=confidence)


class AdapterReference(Reference):
    """The policy with its adapter switched off: the reference costs no memory."""

    def __init__(self, policy: nn.Module) -> None:
        """Use a policy's base weights as the reference.

        Raises:
            ValueError: If the policy has no adapter to switch off.
        """
        if not hasattr(policy, "disable_adapter"):
            raise ValueError(
                '`reference="adapter"` needs a policy with an adapter, got a '
                f'{type(policy).__name__}; set `lora` or use reference="frozen"'
            )
        self._policy: Any = policy

    @torch.no_grad()
    def logps(
        self, batch: PairBatch, *, rows: Rows, plan: ScoringPlan, confidence: bool = False
    ) -> PairLogps:
        """One forward pass of the base weights, in eval mode."""
        with self._policy.disable_adapter(), evaluating(self._policy):
            return score(self._policy, batch, plan=plan, rows=rows, confidence=confidence)


class NoReference(Reference):
    """For losses that need none."""

    def logps(self, batch: PairBatch, *, rows: Rows, plan: ScoringPlan, confidence: bool = False) -> None:
        """Nothing."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every submodule gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _vocabulary(model: nn.Module) -> int | None:
    head = find_head(causal_lm(model))
    weight = getattr(head.module, "weight", None) if head else None
    return None if weight is None else len(weight)
