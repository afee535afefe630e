"""From what `reference` says to a reference: whose weights, who computes, and where values are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_dpo.files import cache_folder
from lightning_dpo.models.build import PolicySettings
from lightning_dpo.models.identity import module_identity, source_identity
from lightning_dpo.models.unwrap import is_sharded
from lightning_dpo.reference.base import NoReference, Reference
from lightning_dpo.reference.cached import CachedReference, ReferenceSource
from lightning_dpo.reference.frozen import AdapterReference, FrozenReference
from lightning_dpo.reference.spec import ReferenceSpec
from lightning_dpo.reference.starting_policy import StartingPolicy

__all__ = ["ModelLoader", "build_cached_reference", "build_reference", "weights_identity"]

ModelLoader: TypeAlias = Callable[[str | nn.Module], nn.Module]
"""Makes a frozen model from a name or a module, whole or split over ranks as the policy is."""


def build_reference(
    spec: ReferenceSpec,
    *,
    policy: nn.Module,
    load: ModelLoader,
    start: str | nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> Reference:
    """Make a reference that is not cached, before the policy changes.

    Args:
        spec: Which one.
        policy: The policy, as built.
        load: Makes another model.
        start: What to make a model from that equals a policy which is split over ranks and cannot be copied.
        dtype: Type that a reference with weights of its own is kept in; None is the policy's.

    Raises:
        ValueError: If the model cannot be loaded or does not go with the policy.
    """
    if spec.kind == "none":
        return NoReference()
    # A fresh adapter changes nothing, so switched off it is the policy at the start: no copy is needed.
    if spec.kind == "adapter" or (spec.kind == "frozen" and hasattr(policy, "disable_adapter")):
        return AdapterReference(policy)
    if spec.kind == "frozen" and not is_sharded(policy):
        return FrozenReference.copy_of(policy, dtype=dtype)
    source = start if spec.kind == "frozen" else spec.model
    assert source is not None, "a policy that is split over ranks is built from something"
    return FrozenReference(load(source), policy=policy, name=str(spec), dtype=dtype)


def weights_identity(
    spec: ReferenceSpec, settings: PolicySettings, *, trainer: pl.Trainer | None = None
) -> str:
    """Identity of a cached reference's weights; ask before the policy is built from what it is given.

    Args:
        spec: The reference.
        settings: Of the policy.
        trainer: One process works it out for all of its processes, which must all call this.

    Raises:
        ValueError: On every process, if the weights cannot be found.
    """
    found: str | ValueError = ""
    if trainer is None or trainer.is_global_zero:
        try:
            found = _identity(spec, settings)
        except ValueError as error:
            found = error
    if trainer is not None:
        found = trainer.strategy.broadcast(found)
    if isinstance(found, ValueError):
        raise found
    return found


def build_cached_reference(
    spec: ReferenceSpec,
    *,
    policy: nn.Module,
    settings: PolicySettings,
    weights: str,
    load: ModelLoader,
    root: str | None = None,
) -> CachedReference:
    """Make a reference that is served from the cache, without loading anything.

    Args:
        spec: Which one.
        policy: The policy, as built: the reference where that is the policy at the start.
        settings: What the policy was built from.
        weights: See `weights_identity`.
        load: Makes a model by name, where one is needed.
        root: Folder or fsspec URL of the cache; None is a folder in the user's cache.
    """

    def load_named(name: str) -> Reference:
        return FrozenReference(load(name), policy=policy, name=name)

    if spec.kind == "model":
        model = spec.model
        assert isinstance(model, str), "only a named model is cached"
        origin = ReferenceSource(model, lambda: load_named(model))
    elif settings.lora is not None:
        origin = ReferenceSource("the policy without its adapter", lambda: AdapterReference(policy))
    elif isinstance(settings.policy, str):
        name = settings.policy
        origin = ReferenceSource(name, lambda: load_named(name), start=StartingPolicy(policy))
    else:
        start = StartingPolicy(policy)
        origin = ReferenceSource("the policy at the start", _gone, start=start, outlives_start=False)
    root = root or str(cache_folder() / "reference")
    return CachedReference(origin, root=root, weights=weights, settings=settings, policy=policy)


def _identity(spec: ReferenceSpec, settings: PolicySettings) -> str:
    name = spec.model if spec.kind == "model" else settings.policy
    if isinstance(name, nn.Module):
        return module_identity(name)
    assert name is not None
    return source_identity(name, trust_remote_code=settings.trust_remote_code)


def _gone() -> Reference:
    raise ValueError(
        '`reference="cached"` lacks log-probabilities of some pairs, and the weights to compute them are '
        "gone: `policy` was given as a module, which has changed since. Give `policy` by name, or fill the "
        "cache before training, from the same weights"
    )
