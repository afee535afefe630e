"""From DPOModule's `reference="cached"` to a reference: whose weights, where they are kept, who computes."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from torch import nn

from lightning_dpo.files import cache_folder
from lightning_dpo.models.build import PolicySettings, load_frozen
from lightning_dpo.models.identity import module_identity, source_identity
from lightning_dpo.reference.base import AdapterReference, Reference
from lightning_dpo.reference.cached import CachedReference, ReferenceSource, StartingPolicy

__all__ = ["build_cached_reference", "cached_source", "weights_identity"]

_CACHED = "cached"


def cached_source(reference: str | nn.Module) -> str | None:
    """What a `reference` that is cached is made from.

    Args:
        reference: DPOModule's argument.

    Returns:
        "" for "cached", the name after "cached:", or None for other references.

    Raises:
        ValueError: If nothing follows "cached:".
    """
    if not isinstance(reference, str) or reference.partition(":")[0] != _CACHED:
        return None
    name = reference.partition(":")[2]
    if reference != _CACHED and not name:
        raise ValueError(
            '`reference="cached:SOURCE"` must name a model, got no name; "cached" takes the policy'
        )
    return name


def weights_identity(source: str, settings: PolicySettings, *, trainer: pl.Trainer | None = None) -> str:
    """Identity of a cached reference's weights; ask before the policy is built from what it is given.

    Args:
        source: See `cached_source`.
        settings: Of the policy.
        trainer: One process works it out for all of its processes, which must all call this.

    Raises:
        ValueError: On every process, if the weights cannot be found.
    """
    found: str | ValueError = ""
    if trainer is None or trainer.is_global_zero:
        try:
            found = _identity(source, settings)
        except ValueError as error:
            found = error
    if trainer is not None:
        found = trainer.strategy.broadcast(found)
    if isinstance(found, ValueError):
        raise found
    return found


def _identity(source: str, settings: PolicySettings) -> str:
    if not source and isinstance(settings.policy, nn.Module):
        return module_identity(settings.policy)
    name = source or settings.policy
    assert isinstance(name, str)
    return source_identity(name, trust_remote_code=settings.trust_remote_code)


def build_cached_reference(
    source: str,
    *,
    policy: nn.Module,
    settings: PolicySettings,
    weights: str,
    root: str | None = None,
    load: Callable[[str], Reference] | None = None,
) -> CachedReference:
    """Make the reference, without loading anything.

    Args:
        source: See `cached_source`.
        policy: The policy, as built: the reference where that is the policy at the start.
        settings: What the policy was built from.
        weights: See `weights_identity`.
        root: Folder or fsspec URL of the cache; None is a folder in the user's cache.
        load: Loads a model by name; by default whole, in the way the policy is loaded.
    """

    def load_whole(name: str) -> Reference:
        return load_frozen(name, policy=policy, settings=settings)

    load = load or load_whole
    if source:
        origin = ReferenceSource(source, lambda: load(source))
    elif settings.lora is not None:
        origin = ReferenceSource("the policy without its adapter", lambda: AdapterReference(policy))
    elif isinstance(settings.policy, str):
        name = settings.policy
        origin = ReferenceSource(name, lambda: load(name), start=StartingPolicy(policy))
    else:
        start = StartingPolicy(policy)
        origin = ReferenceSource("the policy at the start", _gone, start=start, outlives_start=False)
    root = root or str(cache_folder() / "reference")
    return CachedReference(origin, root=root, weights=weights, settings=settings, policy=policy)


def _gone() -> Reference:
    raise ValueError(
        '`reference="cached"` lacks log-probabilities of some pairs, and the weights to compute them are '
        "gone: `policy` was given as a module, which has changed since. Give `policy` by name, or fill the "
        "cache before training, from the same weights"
    )
