"""Models as a trainer wants them: whole, or split over ranks without any rank holding one of them whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dpo.models.build import PolicySettings, build_policy, load_as
from lightning_dpo.models.unwrap import causal_lm
from lightning_dpo.parallel.sharding import Sharding, shard
from lightning_dpo.parallel.weights import (
    WeightSource,
    empty_model,
    is_quantised,
    open_weights,
    saved_tensors,
)

__all__ = ["build_frozen", "build_trained"]


def build_trained(settings: PolicySettings, *, sharding: Sharding | None) -> nn.Module:
    """Build the policy, prepared for training.

    A model that is named and split over ranks is built without weights, sharded, and filled: from safetensors
    each rank reads its own part; other formats are loaded by rank 0 and passed on tensor by tensor. A model
    that is given as an object is held whole by each rank until it is sharded.

    Args:
        settings: Of the policy.
        sharding: How it is split; None leaves it whole.

    Raises:
        ValueError: If the model cannot be loaded or prepared.
    """
    if sharding is None:
        return build_policy(settings)
    if isinstance(settings.policy, nn.Module):
        model = build_policy(settings)
        shard(model, sharding)
        return model
    empty = empty_model(settings.policy, settings)
    wanted = dict(saved_tensors(empty))  # before an adapter renames them
    with _placeholders(empty):
        model = build_policy(settings._replace(policy=empty))
    return _shard_and_fill(model, settings.policy, wanted, settings, sharding)


def build_frozen(
    source: str | nn.Module, settings: PolicySettings, *, sharding: Sharding | None
) -> nn.Module:
    """Build a model that does not train, in the way the policy is loaded and split.

    Args:
        source: Its name, or the model itself.
        settings: Of the policy.
        sharding: How it is split; None leaves it whole.

    Raises:
        ValueError: If the model cannot be loaded.
    """
    if sharding is None:
        return load_as(source, settings) if isinstance(source, str) else source
    if isinstance(source, nn.Module):
        source.requires_grad_(False)
        shard(source, sharding)
        return source
    model = empty_model(source, settings).requires_grad_(False)
    return _shard_and_fill(model, source, dict(saved_tensors(model)), settings, sharding)


def _shard_and_fill(
    model: nn.Module, source: str, wanted: dict[str, Tensor], settings: PolicySettings, sharding: Sharding
) -> nn.Module:
    """Split a model without weights and give each rank its part; `wanted` names its tensors as saved."""
    names = {id(tensor): name for name, tensor in wanted.items()}
    keys = {key: names[id(tensor)] for key, tensor in saved_tensors(model) if id(tensor) in names}
    quantised = is_quantised(causal_lm(model))
    shard(model, sharding)
    with open_weights(source, settings, wanted=wanted, quantised=quantised) as weights:
        _fill(model, keys, weights, sharding)
    return model


def _fill(model: nn.Module, keys: dict[str, str], weights: WeightSource, sharding: Sharding) -> None:
    """Give every empty parameter its values; parameters that are tied share one read."""
    from torch.distributed.tensor import DTensor

    device = torch.device("cpu" if sharding.cpu_offload else sharding.mesh.device_type)
    loaded: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for key, tensor in saved_tensors(model):
        name = keys.get(key)
        if name is None:
            continue
        if name not in loaded:
            if isinstance(tensor, DTensor):
                start = _first_row(tensor, sharding)
                rows = weights.read(name, start, start + tensor.to_local().shape[0])
                part = DTensor.from_local(
                    rows.to(device=device, dtype=tensor.dtype, copy=True),  # not a view of the file
                    tensor.device_mesh,
                    tensor.placements,
                    run_check=False,
                    shape=tensor.shape,
                    stride=tensor.stride(),
                )
                loaded[name] = nn.Parameter(part, requires_grad=tensor.requires_grad)
            else:
                loaded[name] = weights.read(name, 0, len(tensor)).to(tensor, copy=True)
        state[key] = loaded[name]
    missing = [name for name, value in model.named_parameters() if value.is_meta and name not in state]
    assert not missing, f"parameters that nothing fills: {missing[:3]}"
    model.load_state_dict(state, strict=False, assign=True)


def _first_row(tensor: Any, sharding: Sharding) -> int:
    """Where this rank's rows begin: FSDP2 cuts the first dimension as torch.chunk does."""
    rows, ranks = tensor.shape[0], sharding.shard_mesh.size()
    return int(min(sharding.shard_mesh.get_local_rank() * -(-rows // ranks), rows))


@contextmanager
def _placeholders(model: nn.Module) -> Iterator[None]:
    """Put tensors without memory in place of empty parameters for a while.

    An adapter is created on the device of the layer it wraps: this way it has its initial values, drawn as
    for a model that was loaded whole.
    """
    empty = [
        (part, name, parameter)
        for part in model.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    stand_ins: dict[int, nn.Parameter] = {}
    for part, name, parameter in empty:
        if id(parameter) not in stand_ins:
            nothing = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            stand_ins[id(parameter)] = nn.Parameter(nothing, requires_grad=parameter.requires_grad)
        part._parameters[name] = stand_ins[id(parameter)]
    try:
        yield
    finally:
        for part, name, parameter in empty:
            parameter.requires_grad_(part._parameters[name].requires_grad)  # type: ignore[union-attr]
            part._parameters[name] = parameter
