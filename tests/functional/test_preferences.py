from __future__ import annotations

import math

import pytest
import torch

from lightning_dpo.functional import preferred_pairs


def test_the_best_and_the_worst_are_the_pair() -> None:
    scores = torch.tensor([[1.0, 3.0, -2.0], [0.5, 0.5, 0.5], [2.0, 2.0, 1.0], [1.0, 2.0, 1.0]])
    chosen, rejected, gaps = preferred_pairs(scores)
    assert chosen.tolist() == [1, 0, 0, 1]
    assert rejected.tolist() == [2, 2, 2, 2]
    assert gaps.tolist() == [5.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(("gap", "scale"), [(0.0, 1.0), (1.0, 1.0), (2.0, 0.25), (6.0, 0.5)])
def test_labels_are_as_frequent_as_bradley_terry_says(gap: float, scale: float) -> None:
    count = 20_000
    scores = torch.tensor([[0.0, gap]]).repeat(count, 1)
    generator = torch.Generator().manual_seed(1)
    chosen, rejected, gaps = preferred_pairs(scores, label_scale=scale, generator=generator)
    assert (chosen != rejected).all()
    assert torch.equal(gaps, scores[range(count), chosen] - scores[range(count), rejected])
    better = chosen == 1 if gap else chosen == 0
    probability = 1 / (1 + math.exp(-scale * gap))
    spread = math.sqrt(probability * (1 - probability) / count)
    assert float(better.float().mean()) == pytest.approx(probability, abs=4 * spread)


def test_the_generator_is_the_only_source_of_chance() -> None:
    scores = torch.randn(64, 4)
    draws = [
        preferred_pairs(scores, label_scale=1.0, generator=torch.Generator().manual_seed(seed)).chosen
        for seed in (3, 3, 4)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
