"""The family by weights: theta_ref + lambda (theta - theta_ref), each member a plain model."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_dpo.evaluation.realign.family import check_scales
from lightning_dpo.models.adapter_off import AdapterOff

__all__ = ["WeightFamily"]


class WeightFamily:
    """Models on the line from a reference through a policy, in weights.

    Between the two that averages weights; beyond, it extrapolates as ExPO does (https://arxiv.org/abs/2404.16792,
    whose alpha is lambda - 1). A member costs what one model costs, and can be exported. Where the reference
    is the base of the policy's adapter, the adapter's update is scaled, which is the same line.
    """

    def __init__(self, policy: nn.Module, *, reference: nn.Module) -> None:
        """Span a family.

        Args:
            policy: The trained model. With an adapter it is rewritten in place; otherwise it is copied once.
            reference: A model of the same weights' names and shapes, or an `AdapterOff` of the policy.

        Raises:
            ValueError: If the two differ in more than the values of their weights, or the adapter is not one
                that can be scaled.
        """
        self._ends: dict[str, tuple[Tensor, Tensor]]
        if isinstance(reference, AdapterOff) and reference.adapted is policy:
            self._member = policy
            ours = _updates(policy)
            self._ends = {name: (torch.zeros_like(value), value) for name, value in ours.items()}
            return
        ours, theirs = _weights(policy), _weights(reference)
        wrong = [n for n in ours.keys() | theirs.keys() if _shape(ours, n) != _shape(theirs, n)]
        if wrong:
            name = min(wrong)
            raise ValueError(
                "`reference` must have the policy's architecture for a family by weights, got "
                f"{_shape(theirs, name)} for {name}, which has {_shape(ours, name)} in the policy; leave "
                "`weights` out to combine the two models' predictions instead"
            )
        self._member = copy.deepcopy(policy)
        self._ends = {name: (theirs[name], value) for name, value in ours.items()}

    @torch.no_grad()
    def at(self, scale: float) -> nn.Module:
        """The member at lambda: 0 is the reference, 1 the policy. It is rewritten by the next call.

        Raises:
            ValueError: If `scale` is negative or not finite.
        """
        check_scales([scale])
        parameters = dict(self._member.named_parameters())
        for name, (start, end) in self._ends.items():
            # Lerping in float32 need not end in exactly the policy.
            wide = torch.promote_types(torch.float32, end.dtype)
            value = end if scale == 1 else torch.lerp(start.to(end.device, wide), end.to(wide), scale)
            parameters[name].copy_(value)
        return self._member


def _updates(policy: nn.Module) -> dict[str, Tensor]:
    """The weights that an adapter's update is linear in: it is alpha / r * B A, and scaling B scales it."""
    marks, factors = ("lora_", "modules_to_save"), (".lora_A.", ".lora_embedding_A.")
    adapter = {name: p for name, p in policy.named_parameters() if any(mark in name for mark in marks)}
    found = {name: p for name, p in adapter.items() if ".lora_B." in name or ".lora_embedding_B." in name}
    others = [name for name in adapter if name not in found and not any(part in name for part in factors)]
    if others:
        raise ValueError(
            f"a family by weights needs an adapter of updates B A alone, got {min(others)}; leave `weights` "
            "out to combine the two models' predictions instead"
        )
    return {name: p.detach().clone() for name, p in found.items()}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


def _shape(weights: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(weights[name].shape)) if name in weights else "nothing"
