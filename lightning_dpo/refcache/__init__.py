"""The content-addressed store of reference log-probabilities, and the reference that is served from it."""

from __future__ import annotations

from lightning_dpo.refcache.build import build_cached_reference, cached_source, weights_identity
from lightning_dpo.refcache.cached import CachedReference
from lightning_dpo.refcache.fill import FillReferenceCache, fill_cache
from lightning_dpo.refcache.identity import module_identity, source_identity
from lightning_dpo.refcache.keys import pair_keys
from lightning_dpo.refcache.store import CacheUsage, ReferenceCache, Space

__all__ = [
    "CacheUsage",
    "CachedReference",
    "FillReferenceCache",
    "ReferenceCache",
    "Space",
    "build_cached_reference",
    "cached_source",
    "fill_cache",
    "module_identity",
    "pair_keys",
    "source_identity",
    "weights_identity",
]
