"""The limit from tempered samples, against everything that a tiny model can say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from evaluation_models import EOS, MAX_NEW, PROMPT, completions, logp, tiny_llama

from lightning_dpo.evaluation import Sample, best_at_kl, sample_completions
from lightning_dpo.evaluation.tempering import tempered_samples

EVERY = completions()
NUMBER = {tuple(each): index for index, each in enumerate(EVERY)}
REWARDS = torch.randn(len(EVERY), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
MODEL = tiny_llama(0)
LOG_REFERENCE = torch.tensor([logp(MODEL, each) for each in EVERY], dtype=torch.float64)


def complete(prompts: Sequence[Sequence[int]], seed: int) -> list[Sample]:
    return sample_completions(
        MODEL, prompts=prompts, eos_token_id=EOS, max_new_tokens=MAX_NEW, seed=seed, batch_size=2000
    )


def judge(samples: Sequence[Sample]) -> torch.Tensor:
    return torch.tensor([float(REWARDS[NUMBER[tuple(each.completion_ids)]]) for each in samples])


def best_reward(kl: float) -> float:
    """Of pi_ref exp(r / beta) / Z where beta gives this KL, by the definition."""
    low, high = 0.0, 1e3
    for _ in range(80):
        inverse = (low + high) / 2
        log_policy = (LOG_REFERENCE + REWARDS * inverse).log_softmax(0)
        found = float((log_policy.exp() * (log_policy - LOG_REFERENCE)).sum())
        low, high = (inverse, high) if found < kl else (low, inverse)
    return float((log_policy.exp() * REWARDS).sum())


def test_the_limit_is_found_where_samples_of_the_reference_do_not_reach() -> None:
    samples = {"samples_per_prompt": 400, "max_new_tokens": MAX_NEW, "moves": 5}
    found = tempered_samples([PROMPT, PROMPT], complete=complete, judge=judge, kl=3.5, seed=1, **samples)
    assert all(0.02 < share < 1 for share in found.accepted)
    assert len(found.accepted) >= 3
    for kl in (0.5, 2.0, 3.0):
        point = best_at_kl(found.rewards, kl=kl, log_weights=found.log_weights)
        assert point.effective_sample_size > 200
        assert point.reward == pytest.approx(best_reward(kl), abs=0.1), kl
    alone = best_at_kl(found.rewards[:, :400], kl=3.0)
    assert alone.effective_sample_size < 50
    # The weights are those of probabilities: a mean over q of pi_ref / q is 1.
    assert float(found.log_weights.exp().mean()) == pytest.approx(1.0, abs=0.1)


def test_where_half_of_the_samples_are_the_best_there_is_nothing_to_temper() -> None:
    found = tempered_samples(
        [PROMPT],
        complete=complete,
        judge=lambda samples: torch.ones(len(samples)),
        kl=1.0,
        samples_per_prompt=10,
        max_new_tokens=MAX_NEW,
    )
    assert found.rewards.shape == (1, 10)
    assert found.log_weights.tolist() == [[0.0] * 10]
    assert not math.isnan(best_at_kl(found.rewards, kl=1.0, log_weights=found.log_weights).reward)
