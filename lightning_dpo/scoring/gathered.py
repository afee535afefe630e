"""Running a function of a module whose weights are in parts, with the weights at hand that it uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_dpo.models.unwrap import causal_lm

__all__ = ["GATHERED_ENTRY", "run_gathered"]

GATHERED_ENTRY = "_lightning_dpo_run_gathered"
"""Attribute by which a sharded module runs a function of itself with the weights gathered that it uses
without calling the module: ``(function, *args) -> function(module, *args)``."""

_Result = TypeVar("_Result")


def run_gathered(
    function: Callable[..., _Result], module: nn.Module, *args: Any, calls: bool = False
) -> _Result:
    """What a function of a module gives, with the weights at hand that it uses without calling the module.

    Args:
        function: Called with the module and the arguments.
        module: A model, or its head; sharded or not.
        args: Tensors that take a gradient must be among them, not within the function.
        calls: Whether the function calls the module. Under FSDP2 that gathers by itself; under FSDP1 only the
            outermost module does, which the policy is a part of.
    """
    enter: Callable[..., _Result] | None = getattr(module, GATHERED_ENTRY, None)
    if enter is None or (calls and isinstance(causal_lm(module), FSDPModule)):
        return function(module, *args)
    return enter(function, *args)
