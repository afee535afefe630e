"""All ranks share the work of filling the cache, under DDP and FSDP2, and serve each other's pairs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model

sys.path.append(str(Path(__file__).parents[1] / "support"))

import cache_jobs as jobs
from ranks import Ranks

from lightning_dpo.reference.cache.usage import CacheUsage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pool = Ranks(2)
    yield pool
    pool.stop()


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "home"))
    tiny_model().save_pretrained(tmp_path / "model")
    return {
        "policy": str(tmp_path / "model"),
        "cache": str(tmp_path / "cache"),
        "home": str(tmp_path / "home"),
    }


@pytest.mark.parametrize(
    ("named", "strategy"),
    [
        (True, "ddp"),
        (True, "fsdp2"),
        (False, "ddp"),
        pytest.param(False, "fsdp2", marks=pytest.mark.heavy),
    ],
)
def test_ranks_share_the_pass(ranks: Ranks, places: dict[str, Any], strategy: str, named: bool) -> None:
    if not named:
        places["policy"] = None
    cold = ranks.run(jobs.fit, strategy=strategy, **places)
    frozen = ranks.run(jobs.fit, strategy=strategy, reference="frozen", **places)
    for result in cold:
        # Each pair once, by the policy before it changes: 8 batches of 2 over both ranks, in two epochs.
        assert result.usage == CacheUsage(passes=8, pairs=16, from_cache=0)
        assert not result.has_reference
        assert result.losses == pytest.approx(frozen[0].losses, abs=1e-5)
    warm = ranks.run(jobs.fit, strategy=strategy, epochs=3, **places)
    for result in warm:
        assert result.usage == CacheUsage(passes=0, pairs=16, from_cache=16)
        assert len(result.loaded) <= 1
        assert result.losses[:8] == pytest.approx(frozen[0].losses, abs=1e-5)
    alone = jobs.fit(**places)
    assert alone.usage == CacheUsage(passes=0, pairs=16, from_cache=16)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_pass_in_which_one_rank_has_nothing_to_do(
    ranks: Ranks, places: dict[str, Any], strategy: str
) -> None:
    # Every second pair is there already: with batches of one, all that rank 0 gets in this order.
    jobs.fit(**places, count=10, every=2, epochs=1)
    results = ranks.run(jobs.fit, strategy=strategy, count=10, batch_size=1, epochs=1, **places)
    for result in results:
        assert result.usage == CacheUsage(passes=5, pairs=10, from_cache=5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_another_model_as_the_reference(
    ranks: Ranks, places: dict[str, Any], strategy: str, tmp_path: Path
) -> None:
    tiny_model(seed=4).save_pretrained(tmp_path / "other")
    other = str(tmp_path / "other")
    cold = ranks.run(jobs.fit, strategy=strategy, reference=f"cached:{other}", **places)
    warm = ranks.run(jobs.fit, strategy=strategy, reference=f"cached:{other}", **places)
    alone = jobs.fit(reference=f"cached:{other}", **places)
    assert [r.usage for r in cold] == [CacheUsage(passes=8, pairs=16, from_cache=0)] * 2
    assert [r.usage for r in [*warm, alone]] == [CacheUsage(passes=0, pairs=16, from_cache=16)] * 3
    assert not any(r.has_reference for r in [*cold, *warm])
    assert other not in warm[0].loaded
    assert warm[0].losses == pytest.approx(cold[0].losses, abs=1e-5)


def test_ranks_that_do_not_see_each_others_shards(ranks: Ranks, places: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="`reference_cache` must be a folder that all processes see"):
        ranks.run(jobs.fit, strategy="ddp", apart=True, **places)
