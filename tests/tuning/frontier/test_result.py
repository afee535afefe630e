from __future__ import annotations

import io
import math

import pyarrow.parquet as pq
import pytest
import torch
from frontier_results import limit, made_up, points

from lightning_dpo.tuning.frontier.intervals import Interval
from lightning_dpo.tuning.frontier.limit import Limit
from lightning_dpo.tuning.frontier.result import PolicyPoint, to_parquet


def test_methods_are_compared_at_equal_kl() -> None:
    dpo, ppo = made_up().compare()
    assert [share.mean for share in dpo.shares[:2]] == pytest.approx([0.9, 0.9], abs=0.02)
    assert [share.mean for share in ppo.shares[:2]] == pytest.approx([0.7, 0.7], abs=0.02)
    assert ppo.shares[2] is None
    assert (dpo.furthest, ppo.furthest) == (9.0, 4.0)


def test_curves_are_read_at_the_kl_that_is_asked_for_where_the_limit_is_reached_before() -> None:
    rewards = (torch.arange(4000) % 10 < 3).double()
    reached = Limit.of([rewards], [], prompts=1)
    curve = [PolicyPoint("DPO", 1 / kl, 0, kl, 0.0, share, 0.0) for kl, share in ((1.0, 0.5), (8.0, 0.9))]
    (dpo,) = made_up(points=tuple(curve), kls=(1.0, 8.0), limit=reached).compare()
    assert dpo.shares[1] is not None
    assert dpo.shares[1].mean == pytest.approx((0.9 - 0.3) / 0.7)


def test_only_seeds_that_reach_a_kl_count() -> None:
    short = [point for point in points("DPO", 0.9) if point.seed or point.kl < 5]
    (dpo,) = made_up(points=tuple(short), kls=(2.0, 5.0), limit=limit(50_000)).compare()
    assert [share.values for share in dpo.shares if share] == [3, 2]


def test_the_interval_is_student_s() -> None:
    # Of 1, 2, 3: standard error 1 / sqrt(3), and t = 4.302653 with two degrees of freedom.
    interval = Interval.of([1.0, 2.0, 3.0])
    assert interval == (2.0, pytest.approx(4.302653 / math.sqrt(3)), 3)
    assert Interval.of([]) is None
    one = Interval.of([2.0])
    assert one is not None
    assert math.isnan(one.half_width)


def test_the_file() -> None:
    rows = [
        PolicyPoint("DPO", 0.1, 0, 5.0, 0.1, 12.0, 0.2, 0.9),
        PolicyPoint("DPO", 0.4, 1, 9.0, 0.1, 13.0, 0.2),
    ]
    table = pq.read_table(io.BytesIO(to_parquet(rows)))
    assert table.column_names == [
        *("method", "strength", "seed", "kl", "kl_error", "reward", "reward_error", "share_of_limit")
    ]
    assert table["share_of_limit"].to_pylist() == [0.9, None]
    assert table["seed"].to_pylist() == [0, 1]
