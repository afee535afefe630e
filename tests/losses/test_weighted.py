"""Losses that take means over pairs themselves: a pair of weight 2 is the pair twice."""

from __future__ import annotations

import pytest
import torch

from lightning_dpo import losses as L
from lightning_dpo.types import PairLogps

CHOSEN = torch.tensor([-6.0, -4.5, -20.0], dtype=torch.float64)
REJECTED = torch.tensor([-8.0, -3.0, -11.0], dtype=torch.float64)
LENGTHS = torch.tensor([2, 4, 9]), torch.tensor([4, 1, 5])
WEIGHTS = torch.tensor([2.0, 1.0, 3.0])
TWICE = torch.tensor([0, 0, 1, 2, 2, 2])


def logps(weights: torch.Tensor | None) -> tuple[PairLogps, PairLogps]:
    policy = PairLogps(CHOSEN, REJECTED, *LENGTHS, weights=weights)
    return policy, PairLogps(CHOSEN + 1, REJECTED - 0.5, *LENGTHS)


def mean(losses: torch.Tensor, weights: torch.Tensor) -> float:
    return float((losses * weights).sum() / weights.sum())


@pytest.mark.parametrize("make", [lambda: L.SFTLoss(token_weighted=True), lambda: L.BCOLoss(0.3)])
def test_a_weight_is_how_often_a_pair_comes(make) -> None:
    policy, reference = logps(WEIGHTS)
    weighted, repeated = make(), make()
    value = mean(weighted(policy, reference), WEIGHTS)
    often = repeated(policy._replace(weights=None).select(TWICE), reference.select(TWICE))
    assert value == pytest.approx(float(often.mean()), rel=1e-6)
    torch.testing.assert_close(weighted.state_dict(), repeated.state_dict())


def test_token_weighted_is_the_mean_over_tokens_by_hand() -> None:
    losses = L.SFTLoss(token_weighted=True)(logps(WEIGHTS)[0])
    nats, tokens = 2 * 6.0 + 4.5 + 3 * 20.0, 2 * 2 + 4 + 3 * 9
    assert mean(losses, WEIGHTS) == pytest.approx(nats / tokens, rel=1e-12)


def test_bco_forgets_no_weight_in_a_bfloat16_module_and_reads_older_states() -> None:
    loss = L.BCOLoss(0.3).to(torch.bfloat16)
    assert loss.pairs_seen.dtype == torch.float32
    loss.load_state_dict({"delta": torch.tensor(0.5), "pairs_seen": torch.tensor(12)})
    assert (loss.delta.item(), loss.pairs_seen.item()) == (0.5, 12)
