"""FSDP2 on one model: which parts are sharded together, and how a sharded model is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from lightning_dpo.models.unwrap import causal_lm
from lightning_dpo.parallel.ends import shard_ends
from lightning_dpo.scoring.gathered import GATHERED_ENTRY

__all__ = [
    "Sharding",
    "block_classes",
    "blocks",
    "full_state",
    "local",
    "mix_weights",
    "reshard",
    "shard",
    "shard_head",
]

_Result = TypeVar("_Result")


class Sharding(NamedTuple):
    """How models are sharded.

    Attributes:
        mesh: The ranks that share the weights, one-dimensional; or ("replicate", "shard"), of which the
            second dimension shares them and the first holds copies.
        compute_dtype: Type that weights are gathered and computed in; None keeps their own. Gradients are
            reduced in float32 all the same.
        reshard_after_forward: Free a block's gathered weights after its forward pass and gather them again
            for the backward pass; False trades memory for less communication.
        cpu_offload: Keep shards, gradients and optimizer state in the CPU's memory.
        block_classes: Class names of the parts that are sharded one by one; None takes the model's own
            blocks.
    """

    mesh: DeviceMesh
    compute_dtype: torch.dtype | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    block_classes: Sequence[str] | None = None

    @property
    def shard_mesh(self) -> DeviceMesh:
        """The ranks that share one copy of the weights with this one."""
        return self.mesh if self.mesh.ndim == 1 else self.mesh["shard"]


def block_classes(model: nn.Module, names: Sequence[str] | None = None) -> set[type[nn.Module]]:
    """Classes of the parts that repeat: what a transformers model must not split, or its longest list.

    Args:
        model: Any module.
        names: Class names to take instead.

    Raises:
        ValueError: If `names` has a class that the model has no part of.
    """
    kinds = {type(part).__name__: type(part) for part in model.modules()}
    if names is not None:
        missing = [name for name in names if name not in kinds]
        if missing:
            raise ValueError(f"`block_classes` must name parts of {type(model).__name__}, got {missing}")
        return {kinds[name] for name in names}
    known = {
        kinds[name] for name in getattr(causal_lm(model), "_no_split_modules", None) or () if name in kinds
    }
    if known:
        return known
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) > 1]
    return {type(part) for part in max(lists, key=len, default=())}


def blocks(model: nn.Module, names: Sequence[str] | None = None) -> list[nn.Module]:
    """The parts of these classes, outermost only, in the model's order."""
    classes = tuple(block_classes(model, names))
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for part in model.modules():
        if isinstance(part, classes) and part not in inside and part is not model:
            found.append(part)
            inside.update(part.modules())
    return found


def shard(model: nn.Module, sharding: Sharding) -> None:
    """Shard a model in place: each block, the embedding and the head on their own, and the rest together.

    Tied embeddings stay tied, see `shard_ends`. Scoring enters the model by a method of its own, which
    gathers the rest (the final norm; all ends of a network that is not of Hugging Face): it does not pass
    through `forward`.
    """
    options = _options(sharding)
    for block in blocks(model, sharding.block_classes):
        fully_shard(block, reshard_after_forward=sharding.reshard_after_forward, **options)
    # Not an adapter's wrapper: generation goes around it.
    root = causal_lm(model)
    shard_ends(root, reshard_after_forward=sharding.reshard_after_forward, options=options)
    fully_shard(root, **options)
    root.register_forward_hook(lambda *_: _after_pass(model))
    _add_scoring_entry(model)


def shard_head(head: nn.Module, sharding: Sharding) -> None:
    """Shard a head that stands beside the policy, in place; it is computed in the type that it is kept in."""
    fully_shard(head, **_options(sharding._replace(compute_dtype=None)))


def reshard(model: nn.Module) -> None:
    """Free whatever weights are gathered; nothing happens to a model that is not sharded."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, as a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def mix_weights(policy: nn.Module, *, into: nn.Module, share: float) -> None:
    """Move one model's weights towards another's, in place; both of one architecture and sharded alike.

    Args:
        policy: Where to.
        into: What changes.
        share: How far, from 0 to 1.
    """
    reshard(policy)
    reshard(into)
    theirs = dict(policy.named_parameters())
    for name, parameter in into.named_parameters():
        local(parameter).lerp_(local(theirs[name]).to(parameter.dtype), share)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights, on the CPU of rank 0; other ranks get nothing. Every rank must call this."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    reshard(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast("dict[str, Tensor]", get_model_state_dict(model, options=options))


def _options(sharding: Sharding) -> dict[str, Any]:
    precision = MixedPrecisionPolicy(
        param_dtype=sharding.compute_dtype,
        reduce_dtype=None if sharding.compute_dtype is None else torch.float32,
    )
    offload = CPUOffloadPolicy() if sharding.cpu_offload else OffloadPolicy()
    return {"mesh": sharding.mesh, "mp_policy": precision, "offload_policy": offload}


def _after_pass(model: nn.Module) -> None:
    """Free gathered weights where no backward pass will come to do it.

    An adapter that was switched off for this pass must also be switched on again on the shards, which last,
    and not on gathered weights.
    """
    if not torch.is_grad_enabled():
        reshard(model)


def _add_scoring_entry(model: nn.Module) -> None:
    def run(function: Callable[..., _Result], *args: Any) -> _Result:
        return function(model, *args)

    root: Any = causal_lm(model)
    root._lightning_dpo_run = run
    register_fsdp_forward_method(root, "_lightning_dpo_run")

    def enter(function: Callable[..., _Result], *args: Any) -> _Result:
        result: _Result = root._lightning_dpo_run(function, *args)
        _after_pass(model)
        return result

    setattr(model, GATHERED_ENTRY, enter)
