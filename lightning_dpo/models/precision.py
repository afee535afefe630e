"""Which type a model's weights are kept in, and which its matrix products run in."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel

__all__ = [
    "ComputeType",
    "ExactFrequencies",
    "autocast_dtype",
    "compute_type",
    "has_frequencies",
    "has_slow_bfloat16",
    "matmul_precision",
    "move",
    "take_types",
    "weights_dtype",
]

ComputeType: TypeAlias = Literal["float64", "float32", "tf32", "bfloat16", "float16"]

_WORDS: dict[str, tuple[ComputeType, ...]] = {
    "highest": ("float32",),
    "high": ("tf32",),
    "medium": ("bfloat16", "tf32"),
}
"""What float32 products run in by the words of `torch.set_float32_matmul_precision`."""

_NAMES: dict[torch.dtype, ComputeType] = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def compute_type(model: nn.Module, *, device: torch.device) -> ComputeType:
    """The type that a model's matrix products run in here and now.

    That is autocast's where it is on, what FSDP gathers weights in where the model is sharded, else the type
    of the weights themselves; and for float32 products what `torch.set_float32_matmul_precision` allows in
    their place.

    Args:
        model: The model.
        device: Where it runs.
    """
    dtype = weights_dtype(model)
    if dtype != torch.float64:
        dtype = autocast_dtype(device) or dtype
    if dtype == torch.float32:
        return _float32_products(device)
    return _NAMES.get(dtype, "float16")


def has_slow_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are slower there than in float32: on an x86 processor without AVX-512.

    Args:
        device: Where a model runs.
    """
    is_x86 = device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")
    return is_x86 and "AVX512" not in torch.backends.cpu.get_cpu_capability()


def matmul_precision(device: torch.device) -> str:
    """What float32 products may run in, in the words of `torch.set_float32_matmul_precision`.

    torch itself raises, or gives an older answer, where it was set by a backend's `fp32_precision`.
    """
    products = _float32_products(device)
    try:
        said = torch.get_float32_matmul_precision()
    except RuntimeError:
        said = ""
    # "medium" is TF32 on GPUs.
    fitting = [word for word, kinds in _WORDS.items() if products in kinds]
    return said if said in fitting else fitting[0]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast computes products in on a device; None where it is off, or does not exist."""
    kind = device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_on else None


def weights_dtype(model: nn.Module) -> torch.dtype:
    """The type in which a forward pass finds the weights: what FSDP gathers them in, else their own.

    Args:
        model: The model; sharded weights need not be gathered at the time.
    """
    for part in model.modules():
        if isinstance(part, FSDPModule):
            gathered = part._get_fsdp_state()._mp_policy.param_dtype
        elif isinstance(part, FullyShardedDataParallel):
            gathered = part.mixed_precision.param_dtype
        else:
            continue
        if gathered is not None:
            return gathered
    # Not the first weight: a quantised one is of integers.
    kinds = (p.dtype for p in model.parameters() if p.dtype in _NAMES)
    return next(kinds, torch.float32)


def move(model: nn.Module, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
    """Move a model in place, and convert it as `from_pretrained` would have loaded it.

    `Module.to` also rounds the rotary frequencies, which a model loaded in bfloat16 keeps in float32: at
    position 1000 an angle is then off by radians. Where the weights have the type already, nothing is
    converted, so that what is kept in a wider type stays so.

    Args:
        model: The model; not of a kind that may not be converted, such as one in 4 bits.
        device: Where to; None leaves it where it is.
        dtype: Type of its weights; None leaves it.
    """
    kinds = (p.dtype for p in model.parameters() if p.is_floating_point())
    if dtype in (None, next(kinds, dtype)):
        model.to(device=device)
        return
    with _exact_frequencies(model):
        model.to(device=device, dtype=dtype)


def take_types(model: nn.Module, *, like: nn.Module) -> None:
    """Convert tensors of a model to the types of those that have the same names in another one."""
    theirs = {**dict(like.named_parameters()), **dict(like.named_buffers())}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        other = theirs.get(name)
        if other is not None and tensor.dtype != other.dtype and _are_floating(tensor, other):
            tensor.data = tensor.data.to(other.dtype)


class ExactFrequencies(nn.Module):
    """A module that may be converted whole: the rotary frequencies of models within keep their type.

    A trainer's `precision: bf16-true` converts it.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001
        with _exact_frequencies(self):
            converted: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return converted


def has_frequencies(model: nn.Module) -> bool:
    """Whether a model computes positions from frequencies that it keeps in float32 whatever its type."""
    return bool(_frequencies(model))


@contextmanager
def _exact_frequencies(model: nn.Module) -> Iterator[None]:
    held = _frequencies(model)
    yield
    for part, name, before in held:
        now = part._buffers[name]
        if now is not None and now.dtype != before.dtype and not before.is_meta:
            part._buffers[name] = before.to(now.device)


def _frequencies(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Buffers of rotary frequencies. Other networks than transformers' need not be written for two types."""
    within = {
        part: None
        for outer in model.modules()
        if isinstance(outer, PreTrainedModel)
        for part in outer.modules()
    }
    return [
        (part, name, buffer)
        for part in within
        for name, buffer in part._buffers.items()
        if buffer is not None and name.endswith("inv_freq") and name in part._non_persistent_buffers_set
    ]


def _are_floating(*tensors: Tensor) -> bool:
    return all(tensor.is_floating_point() for tensor in tensors)


def _float32_products(device: torch.device) -> ComputeType:
    """What float32 products run in: TF32 has the 10 bits of float16, and "medium" may take bfloat16."""
    backends: Any = torch.backends
    backend = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    allowed: dict[str, ComputeType] = {"tf32": "tf32", "bf16": "bfloat16"}
    return allowed.get(getattr(backend, "fp32_precision", "ieee"), "float32")
