"""A model's weights in parts: read by each rank from safetensors, or passed on by rank 0."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, distributed, nn

from lightning_dpo.models.load import load_model, resolve_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_dpo.models.build import PolicySettings

__all__ = ["WeightSource", "empty_model", "is_quantised", "open_weights", "saved_tensors"]

_COMPUTED = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightSource(ABC):
    """Where a model's weights come from; every rank reads the same tensors in the same order."""

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor, by its name in the model as loaded."""


class _FromFiles(WeightSource):
    """Each rank reads its rows, and nothing else is read."""

    def __init__(self, slices: dict[str, Any]) -> None:
        self._slices = slices

    def read(self, name: str, start: int, stop: int) -> Tensor:
        rows: Tensor = self._slices[name][start:stop]
        return rows


class _FromRankZero(WeightSource):
    """Rank 0 holds the model, and sends one tensor at a time."""

    def __init__(self, held: dict[str, Tensor], *, shapes: dict[str, Tensor], device: torch.device) -> None:
        self._held = held
        self._shapes = shapes
        self._device = device

    def read(self, name: str, start: int, stop: int) -> Tensor:
        like = self._shapes[name]
        if distributed.get_rank() == 0:
            whole = self._held[name].detach().to(device=self._device, dtype=like.dtype).contiguous()
        else:
            whole = torch.empty(like.shape, dtype=like.dtype, device=self._device)
        distributed.broadcast(whole, src=0)
        return whole[start:stop].clone()


def empty_model(source: str, settings: PolicySettings) -> PreTrainedModel:
    """The model that a source names with parameters that have a shape and no memory; buffers are real.

    Raises:
        ValueError: If the source cannot be found or holds no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name, gguf_file = resolve_source(source)
    try:
        files = {"gguf_file": gguf_file} if gguf_file else {}
        config = AutoConfig.from_pretrained(name, trust_remote_code=settings.trust_remote_code, **files)
        options: dict[str, Any] = {"dtype": settings.dtype, "trust_remote_code": settings.trust_remote_code}
        if settings.attn_implementation:
            options["attn_implementation"] = settings.attn_implementation
        auto: Any = AutoModelForCausalLM
        with _without_memory():
            model = auto.from_config(config, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"no causal language model could be loaded from {source!r}: {error}") from error
    return cast("PreTrainedModel", model.eval())


@contextmanager
def open_weights(
    source: str, settings: PolicySettings, *, wanted: dict[str, Tensor], quantised: bool = False
) -> Iterator[WeightSource]:
    """Open a model's weights for reading in parts. Every rank must call this.

    Args:
        source: What `load_model` takes.
        settings: How models are loaded.
        wanted: What `saved_tensors` gives for the model as `empty_model` made it. Files are read directly if
            they hold every one of them under the same name and in the same shape.
        quantised: Whether files hold something else than the weights.

    Raises:
        ValueError: On every rank, if rank 0 cannot load the model, or its weights stay quantised.
    """
    with ExitStack() as stack:
        slices = None if quantised else _open_slices(_weight_files(source), wanted, stack)
        if _true_on_all_ranks(slices is not None):
            assert slices is not None
            yield _FromFiles(slices)
            return
        held: dict[str, Tensor] = {}
        problem: list[str] = [""]
        if distributed.get_rank() == 0:
            try:
                held = _load_whole(source, settings, wanted)
            except Exception as error:  # whatever it is, the other ranks must not wait for weights
                problem = [str(error) or type(error).__name__]
        distributed.broadcast_object_list(problem, src=0, device=_group_device())
        if problem[0]:
            raise ValueError(problem[0])
        yield _FromRankZero(held, shapes=wanted, device=_group_device())


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What checkpoints hold: parameters, tied ones under each of their names, and persistent buffers."""
    yield from model.named_parameters(remove_duplicate=False)
    parameters = {id(parameter) for parameter in model.parameters()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in parameters:
            yield name, tensor


def _load_whole(source: str, settings: PolicySettings, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors as checkpoints name them, none of them quantised.

    Raises:
        ValueError: If the model cannot be loaded, or one of the tensors is not what is wanted.
    """
    whole = load_model(
        source,
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        trust_remote_code=settings.trust_remote_code,
    )
    held, cause = dict(saved_tensors(whole)), ""
    if _differing(held, wanted):
        # Weights in 8 or 4 bits mean nothing without their scales, which have names of their own.
        try:
            held = dict(saved_tensors(whole.dequantize()))  # type: ignore[no-untyped-call]
        except Exception as error:  # each kind of quantisation has its own
            cause = f" ({type(error).__name__}: {error})"
    differing = _differing(held, wanted)
    if differing:
        raise ValueError(
            f"`policy` must have weights that can be split over ranks, got {source!r}, which stay quantised: "
            f"{', '.join(differing[:3])}{cause}; save it dequantised, or take a repository that is not "
            "quantised, or train an adapter without sharding"
        )
    return held


def _differing(held: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Those of the wanted tensors that are missing, of another shape, or not of the kind that is computed."""
    return [
        name
        for name, like in wanted.items()
        if name not in held
        or held[name].shape != like.shape
        or (like.is_floating_point() and held[name].dtype not in _COMPUTED)
    ]


def _weight_files(source: str) -> list[Path]:
    """The safetensors files of a source; none if it has other files."""
    from transformers.utils.hub import cached_file

    name, gguf_file = resolve_source(source)
    if gguf_file:
        return []

    def find(file: str) -> Path | None:
        found = cached_file(
            name,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)

    index = find(_INDEX)
    if index is None:
        single = find(_SINGLE)
        return [] if single is None else [single]
    parts = [find(part) for part in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [part for part in parts if part is not None]


def _open_slices(files: list[Path], wanted: dict[str, Tensor], stack: ExitStack) -> dict[str, Any] | None:
    """Views of the wanted tensors in files; None if one is missing or has another shape."""
    slices: dict[str, Any] = {}
    for file in files:
        handle = stack.enter_context(safe_open(file, framework="pt"))
        slices.update((name, handle.get_slice(name)) for name in handle.keys())  # noqa: SIM118
    distinct = {id(tensor): name for name, tensor in reversed(wanted.items())}
    for tensor_id, name in distinct.items():
        names = [other for other, tensor in wanted.items() if id(tensor) == tensor_id]
        held = next((other for other in names if other in slices), None)
        if held is None or tuple(slices[held].get_shape()) != tuple(wanted[name].shape):
            return None
        slices.update((other, slices[held]) for other in names)
    return slices


def is_quantised(model: nn.Module) -> bool:
    """Whether a model's files hold quantised weights."""
    config: Any = model.config
    return getattr(config, "quantization_config", None) is not None


def _true_on_all_ranks(flag: bool) -> bool:  # noqa: FBT001
    agreed = torch.tensor(int(flag), device=_group_device())
    distributed.all_reduce(agreed, op=distributed.ReduceOp.MIN)
    return bool(agreed)


def _group_device() -> torch.device:
    """Where tensors must be to travel between ranks."""
    if "nccl" in distributed.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@contextmanager
def _without_memory() -> Iterator[None]:
    """Parameters that modules register become shapes only, one by one; buffers, which are computed, stay."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
