"""What the ranks of a test of weights run that rank 0 passes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_dpo.models.build import PolicySettings
from lightning_dpo.parallel import weights as weights_module

WEIGHT = torch.tensor([[0.5, -1.0, 2.0], [4.0, 0.25, -8.0]])
SCALE = 3.0


class Eighths(nn.Module):
    """A model as repositories in 8 bits load: weights in float8, beside what they are to be multiplied by."""

    def __init__(self, *, can_dequantise: bool, packed: bool) -> None:
        super().__init__()
        values = WEIGHT.to(torch.float8_e4m3fn)
        kept = torch.zeros(3, 1, dtype=torch.uint8) if packed else values
        self.weight = nn.Parameter(kept, requires_grad=False)
        self.register_buffer("weight_scale_inv", torch.tensor(SCALE))
        self._can_dequantise = can_dequantise

    def dequantize(self) -> nn.Module:
        if not self._can_dequantise:
            raise NotImplementedError("this kind cannot be")
        plain = nn.Module()
        plain.weight = nn.Parameter(WEIGHT * SCALE)
        return plain


class Unloadable:
    """What `load_model` does where a package is missing."""

    def __init__(self, **_: Any) -> None:
        raise ImportError("the kernels are not installed")


def read(*, kind: str) -> Tensor | str:
    """What a rank reads of a model that rank 0 loads, or the error that it gets."""
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    settings = PolicySettings("packed", None, torch.bfloat16, None, False, True, False)
    wanted = {"weight": torch.empty(2, 3, dtype=torch.bfloat16, device="meta")}
    make = Unloadable if kind == "unloadable" else Eighths
    options = {"can_dequantise": kind == "8 bits", "packed": kind == "4 bits"}
    original = weights_module.load_model
    weights_module.load_model = lambda *_, **__: make(**options)  # type: ignore[assignment]
    try:
        with weights_module.open_weights("packed", settings, wanted=wanted, quantised=True) as weights:
            return weights.read("weight", 0, 2)
    except ValueError as error:
        return str(error)
    finally:
        weights_module.load_model = original
