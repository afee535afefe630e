"""References that are run at each step: a frozen model, or the policy with its adapter off."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_dpo.models.modes import evaluating
from lightning_dpo.models.precision import move, take_types
from lightning_dpo.models.unwrap import causal_lm
from lightning_dpo.reference.base import Reference
from lightning_dpo.scoring.forward import ScoringPlan, completion_logps, lay_out, score_rows
from lightning_dpo.scoring.lm_head import TokenLogps, find_head
from lightning_dpo.types import CompletionBatch, CompletionLogps

__all__ = ["AdapterReference", "FrozenReference"]


class _ModelReference(Reference):
    """A reference that a model is run for, once for each batch."""

    @torch.no_grad()
    def logps(self, batch: CompletionBatch, *, plan: ScoringPlan) -> CompletionLogps:
        """One forward pass, in eval mode."""
        return completion_logps(self._scored(batch, plan), batch)

    @torch.no_grad()
    def token_logps(self, batch: CompletionBatch, *, plan: ScoringPlan) -> Tensor:
        """One forward pass, in eval mode."""
        return self._scored(batch, plan).logps

    @abstractmethod
    def _scored(self, batch: CompletionBatch, plan: ScoringPlan) -> TokenLogps: ...


class FrozenReference(_ModelReference):
    """A model of its own, in eval mode for good."""

    can_update = True

    def __init__(
        self,
        model: nn.Module,
        *,
        policy: nn.Module,
        name: str = "reference",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Freeze a model as the reference.

        Args:
            model: The reference; frozen and put in eval mode in place.
            policy: The model it is compared with.
            name: What errors call it.
            dtype: Floating-point type that it is kept in; None is the policy's.

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
            # What was found to be exact for the policy would be taken for granted here.
            raise ValueError(
                f"`reference` must have the policy's architecture, {kinds[0].__name__}, got "
                f"{kinds[1].__name__} ({name}); pass the model that the policy started from"
            )
        self._model = model.eval().requires_grad_(False)
        self._dtype = dtype

    @classmethod
    def copy_of(cls, policy: nn.Module, *, dtype: torch.dtype | None = None) -> FrozenReference:
        """A copy of the policy as it is now, in a floating-point type of its own or the policy's."""
        model = copy.deepcopy(policy)
        move(model, dtype=dtype)
        return cls(model, policy=policy, dtype=dtype)

    @property
    def model(self) -> nn.Module:
        """The frozen model."""
        return self._model

    def match(self, policy: nn.Module) -> None:
        """Move to the policy's device, and to its type if none was given; attend as it does."""
        parameter = next(policy.parameters())
        move(self._model, device=parameter.device, dtype=self._dtype or parameter.dtype)
        if self._dtype is None:
            take_types(self._model, like=policy)
        ours, theirs = causal_lm(policy), causal_lm(self._model)
        if isinstance(ours, PreTrainedModel) and isinstance(theirs, PreTrainedModel):
            implementation = ours.config.get_text_config()._attn_implementation
            if theirs.config.get_text_config()._attn_implementation != implementation:
                theirs.set_attn_implementation(implementation)

    def _scored(self, batch: CompletionBatch, plan: ScoringPlan) -> TokenLogps:
        if self._model.training:  # a reference that is saved is part of the module, which has its mode set
            self._model.eval()
        self.passes += 1
        return _score(self._model, batch, plan)


class AdapterReference(_ModelReference):
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

    def _scored(self, batch: CompletionBatch, plan: ScoringPlan) -> TokenLogps:
        self.passes += 1
        with self._policy.disable_adapter(), evaluating(self._policy):
            return _score(self._policy, batch, plan)


def _score(model: nn.Module, batch: CompletionBatch, plan: ScoringPlan) -> TokenLogps:
    rows = lay_out(batch, model=model, plan=plan)
    return score_rows(model, rows, plan=plan._replace(confidences=False))


def _vocabulary(model: nn.Module) -> int | None:
    head = find_head(causal_lm(model))
    weight = getattr(head.module, "weight", None) if head else None
    return None if weight is None else len(weight)
