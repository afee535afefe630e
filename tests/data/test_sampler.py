from __future__ import annotations

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dpo.data.sampler import BatchIndices, OrderedPairBatchSampler, PairBatchSampler

lengths_lists = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def ranks(lengths: list[int], *, epoch: int = 0, world_size: int, **options) -> list[list[BatchIndices]]:
    samplers = [
        PairBatchSampler(lengths, rank=rank, world_size=world_size, **options) for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


@settings(deadline=None)
@given(
    lengths=lengths_lists,
    batch_size=st.none() | st.integers(1, 7),
    budget=st.none() | st.integers(1, 200),
    world_size=st.integers(1, 4),
    accumulate=st.integers(1, 4),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_whatever_the_settings(lengths, batch_size, budget, world_size, accumulate, epoch, shuffle) -> None:
    if batch_size is None and budget is None:
        batch_size = 3
    options = {"batch_size": batch_size, "tokens_per_batch": budget, "shuffle": shuffle, "seed": 1}
    batches = ranks(lengths, epoch=epoch, world_size=world_size, accumulate=accumulate, **options)
    everything = list(itertools.chain(*batches))

    # Every pair once with weight 1, anything else with weight 0.
    weights: Counter[int] = Counter()
    for batch in everything:
        for index, weight in zip(batch.indices, batch.weights, strict=True):
            weights[int(index)] += float(weight)
    assert weights == dict.fromkeys(range(len(lengths)), 1.0)

    # Ranks take equally many steps, as many in every epoch, and no step is without a pair.
    steps = {len(rank) for rank in batches}
    assert len(steps) == 1
    assert steps == {len(rank) for rank in ranks(lengths, epoch=epoch + 1, world_size=world_size, **options)}
    assert all(sum(float(r.weights.sum()) for r in step) > 0 for step in zip(*batches, strict=True))

    for batch in everything:
        tokens = [lengths[index] for index in batch.indices]
        assert len(tokens) >= 1
        assert batch_size is None or len(tokens) <= batch_size
        assert budget is None or len(tokens) * max(tokens) <= budget or len(tokens) == 1

    # What the trainer makes of the losses of a window: the mean over ranks of sums over batches divided by
    # `accumulate`. It must be the mean over the window's pairs.
    losses = np.random.default_rng(0).normal(size=len(lengths))
    for start in range(0, steps.pop(), accumulate):
        window = [batch for rank in batches for batch in rank[start : start + accumulate]]
        stepped = sum((r.weights * losses[r.indices]).sum() / r.denominator / accumulate for r in window)
        pairs = [index for r in window for index in r.indices[r.weights > 0]]
        assert stepped / world_size == pytest.approx(losses[pairs].mean(), abs=1e-6)


@settings(deadline=None)
@given(
    lengths=lengths_lists,
    budget=st.none() | st.integers(1, 200),
    world_size=st.integers(1, 3),
    accumulate=st.integers(1, 4),
    data=st.data(),
)
def test_a_window_takes_the_weighted_mean(lengths, budget, world_size, accumulate, data) -> None:
    size = len(lengths)
    weights = data.draw(st.lists(st.floats(2**-10, 100, width=32), min_size=size, max_size=size))
    weights = np.array(weights, dtype=np.float32)
    losses = np.random.default_rng(0).normal(size=size)
    batches = ranks(
        lengths,
        world_size=world_size,
        batch_size=3,
        tokens_per_batch=budget,
        accumulate=accumulate,
        weights=weights,
    )
    for start in range(0, len(batches[0]), accumulate):
        window = [batch for rank in batches for batch in rank[start : start + accumulate]]
        for r in window:
            assert r.weights.tolist() in (weights[r.indices].tolist(), [0.0])
        stepped = sum((r.weights * losses[r.indices]).sum() / r.denominator / accumulate for r in window)
        pairs = [index for r in window for index in r.indices[r.weights > 0]]
        mean = np.average(losses[pairs], weights=weights[pairs])
        assert stepped / world_size == pytest.approx(mean, rel=1e-5, abs=1e-5)


def test_a_token_budget_by_hand() -> None:
    # 4 of the short pairs fit in 40 tokens, 2 of the middling, and the long one is longer than the budget.
    sampler = PairBatchSampler([10, 50, 9, 20, 8, 18, 10], tokens_per_batch=40, shuffle=False)
    assert [sorted(batch.indices.tolist()) for batch in sampler] == [[0, 2, 4, 6], [3, 5], [1]]
    assert [batch.denominator for batch in sampler] == [4.0, 2.0, 1.0]


def test_short_and_long_batches_alternate() -> None:
    lengths = np.arange(1, 400)
    longest = [int(lengths[r.indices].max()) for r in PairBatchSampler(lengths, tokens_per_batch=800)]
    assert longest != sorted(longest)
    assert sorted(longest)[: len(longest) // 2] != longest[: len(longest) // 2]
    ordered = [int(lengths[r.indices].max()) for r in OrderedPairBatchSampler(lengths, tokens_per_batch=800)]
    assert ordered == sorted(ordered)


def test_pairs_that_fill_no_batch_join_the_next_longer_ones() -> None:
    # 5 short pairs: 4 fill a batch, the other goes with a pair of 20 tokens.
    sampler = PairBatchSampler([10, 10, 10, 10, 10, 20], tokens_per_batch=40, shuffle=False)
    assert [batch.indices.tolist() for batch in sampler] == [[0, 1, 2, 3], [4, 5]]


def test_batches_hold_pairs_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(20, 1000, size=5000)
    sampler = PairBatchSampler(lengths, tokens_per_batch=8192)
    padded = sum(len(r.indices) * int(lengths[r.indices].max()) for r in sampler)
    assert lengths.sum() / padded > 0.9  # 0.55 at random
    assert lengths.sum() / (len(sampler) * 8192) > 0.85


def test_fixed_batches_of_an_epoch_by_hand() -> None:
    sampler = OrderedPairBatchSampler([1] * 5, batch_size=2)
    assert [batch.indices.tolist() for batch in sampler] == [[0, 1], [2, 3], [4]]
    first, second = (
        OrderedPairBatchSampler([3, 1, 2], batch_size=2, rank=rank, world_size=2) for rank in (0, 1)
    )
    assert [r.indices.tolist() for r in first] == [[0, 1]]
    assert [r.indices.tolist() for r in second] == [[2]]
    # The mean over ranks of (sum / 1.5) is the sum of both / 3.
    assert [r.denominator for r in (*first, *second)] == [1.5, 1.5]


def test_a_rank_without_pairs_left_gets_a_filler_of_weight_0() -> None:
    batches = [r[0] for r in ranks([5, 1, 9], world_size=3, batch_size=2, shuffle=False)]
    assert [r.indices.tolist() for r in batches] == [[0, 1], [2], [1]]  # the shortest pair
    assert [r.weights.tolist() for r in batches] == [[1, 1], [1], [0]]
    assert [r.denominator for r in batches] == [1.0, 1.0, 1.0]


def test_accumulating_small_batches_takes_the_pairs_of_a_large_one() -> None:
    small = [r.indices.tolist() for r in PairBatchSampler([1] * 12, batch_size=2, seed=3, accumulate=3)]
    large = [r.indices.tolist() for r in PairBatchSampler([1] * 12, batch_size=6, seed=3)]
    assert [list(itertools.chain(*small[k : k + 3])) for k in (0, 3)] == large
    spread = ranks([1] * 12, world_size=3, batch_size=2, seed=3)
    assert [list(itertools.chain(*(rank[k].indices.tolist() for rank in spread))) for k in (0, 1)] == large


def test_the_seed_and_the_epoch_decide_everything() -> None:
    lengths = list(range(1, 40))

    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = PairBatchSampler(lengths, tokens_per_batch=80, seed=seed)
        sampler.set_epoch(epoch)
        return [r.indices.tolist() for r in sampler]

    assert order(0, 2) == order(0, 2)
    assert order(0, 2) != order(0, 1)
    assert order(0, 2) != order(1, 2)


def test_an_epoch_goes_on_from_any_batch() -> None:
    sampler = PairBatchSampler(list(range(1, 40)), tokens_per_batch=80)
    sampler.set_epoch(4)
    whole = [r.indices.tolist() for r in sampler]
    sampler.start = 5
    assert [r.indices.tolist() for r in sampler] == whole[5:]
    assert len(sampler) == len(whole)


def test_a_new_epoch_does_not_change_an_iteration_that_has_begun() -> None:
    sampler = PairBatchSampler([1] * 20, batch_size=3)
    whole = [r.indices.tolist() for r in sampler]
    iterator = iter(sampler)
    sampler.set_epoch(1)
    assert [r.indices.tolist() for r in iterator] == whole


def test_accumulation_may_change_between_epochs() -> None:
    # 5 pairs in batches of 2, 2 and 1: from epoch 1 on, windows of two batches.
    sampler = OrderedPairBatchSampler([1] * 5, batch_size=2, accumulate={0: 1, 1: 2})
    assert [r.denominator for r in sampler] == [2.0, 2.0, 1.0]
    sampler.set_epoch(1)
    assert [r.denominator for r in sampler] == [2.0, 2.0, 0.5]  # the trainer still divides by 2


@pytest.mark.parametrize(("limit", "denominators"), [(3, [2, 2, 1]), (0.6, [2, 2, 1]), (1.0, [2, 2, 2, 2])])
def test_a_limit_ends_the_last_window(limit: int | float, denominators: list[float]) -> None:
    sampler = OrderedPairBatchSampler([1] * 10, batch_size=2, accumulate=2)
    sampler.limit(limit)
    assert [r.denominator for r in sampler][: len(denominators)] == denominators


def test_a_sampler_can_be_sent_to_another_process() -> None:
    sampler = PairBatchSampler(list(range(1, 40)), tokens_per_batch=80, seed=2)
    copied = pickle.loads(pickle.dumps(sampler))
    assert [r.indices.tolist() for r in copied] == [r.indices.tolist() for r in sampler]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`batch_size` or `tokens_per_batch` must be given"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"tokens_per_batch": -1}, "`tokens_per_batch` must be at least 1, got -1"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "`rank` must be"),
        (
            {"batch_size": 1, "weights": np.ones(3)},
            "`weights` must have a number above 0 for each of 2 pairs",
        ),
        ({"batch_size": 1, "weights": np.array([1, 0])}, "`weights` must have a number above 0"),
        ({"lengths": [], "batch_size": 1}, "`lengths` must hold at least one pair"),
    ],
)
def test_senseless_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairBatchSampler(options.pop("lengths", [1, 2]), **options)
