"""Made-up entries of the reference cache, and whether a cache serves them."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_dpo.reference.cache.shards import Entries
from lightning_dpo.reference.cache.store import ReferenceCache, Space

SPACE = Space("weights", "float32", "None highest", "default")


def entries(count: int, *, seed: int = 0) -> Entries:
    random = np.random.default_rng(seed)
    return Entries(
        random.integers(0, 2**64, (count, 2), dtype=np.uint64),
        random.normal(size=count).astype(np.float32),
        random.integers(1, 99, count).astype(np.int32),
    )


def found(cache: ReferenceCache, wanted: Entries) -> np.ndarray[Any, Any]:
    served = cache.find(wanted.keys)
    here = served.found
    np.testing.assert_array_equal(served.logps[here], wanted.logps[here])
    np.testing.assert_array_equal(served.lengths[here], wanted.lengths[here])
    return here
