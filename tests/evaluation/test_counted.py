"""Two models on completions of which some tokens do not count, as what users and tools say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import OwnNetwork, random_pairs, tiny_model
from torch import Tensor

from lightning_dpo.evaluation.kl import sample_logps
from lightning_dpo.evaluation.logits import ModelPair
from lightning_dpo.evaluation.realign import realigned_pairs, score_family
from lightning_dpo.evaluation.sampling import Sample
from lightning_dpo.types import PairBatch

PAIRS = random_pairs(5, seed=3)
COUNTED = [
    tuple([k == 0 or (k + row) % 3 > 0 for k in range(len(ids))] for ids in pair[1:])
    for row, pair in enumerate(PAIRS)
]


def models(kind: str) -> tuple[Any, Any]:
    if kind == "llama":
        return tiny_model(), tiny_model(seed=1)
    torch.manual_seed(0)
    return OwnNetwork(), OwnNetwork()


@torch.no_grad()
def by_hand(policy: Any, reference: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of each completion, first the chosen ones: log pi, log pi_ref and KL, over the tokens that count."""
    sums = []
    for side in (0, 1):
        for pair, masks in zip(PAIRS, COUNTED, strict=True):
            ids = [*pair.prompt_ids, *pair[1 + side]]
            tables = []
            for model in (policy, reference):
                output = model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
                logits = output if isinstance(output, Tensor) else output.logits
                tables.append(logits[0].double().log_softmax(-1))
            ours, theirs = tables
            places = [len(pair.prompt_ids) - 1 + k for k, counts in enumerate(masks[side]) if counts]
            sums.append(
                [
                    sum(ours[place, ids[place + 1]] for place in places),
                    sum(theirs[place, ids[place + 1]] for place in places),
                    sum((ours[place].exp() * (ours[place] - theirs[place])).sum() for place in places),
                ]
            )
    return tuple(torch.tensor(sums).unbind(1))  # type: ignore[return-value]


@pytest.mark.parametrize("chunk_elements", [1, 400, 10**6])
@pytest.mark.parametrize("kind", ["llama", "own"])
def test_sums_are_over_the_tokens_that_count(kind: str, chunk_elements: int) -> None:
    policy, reference = models(kind)
    batch = PairBatch.from_pairs(PAIRS, counted=COUNTED)
    assert 0 < int(batch.counted.sum()) < len(batch.counted)
    scores = score_family(
        ModelPair(policy, reference, layout="auto"),
        batch.completions(),
        scales=[1.0],
        chunk_elements=chunk_elements,
    )
    found = (scores.logps[0], scores.reference_logps, scores.kl[0])
    for value, expected in zip(found, by_hand(policy, reference), strict=True):
        torch.testing.assert_close(value.double(), expected.double(), atol=1e-4, rtol=1e-4)
    plain = [Sample(pair.prompt_ids, ids) for side in (1, 2) for pair in PAIRS for ids in [pair[side]]]
    assert not torch.allclose(sample_logps(policy, samples=plain), scores.logps[0], atol=1e-2)


def test_pairs_are_measured_by_the_tokens_that_count() -> None:
    policy, reference = models("llama")
    batch = PairBatch.from_pairs(PAIRS, counted=COUNTED)
    [member] = realigned_pairs(policy, reference=reference, batches=[batch], scales=[1.0])
    ours, theirs, kl = by_hand(policy, reference)
    chosen, rejected = (ours - theirs).chunk(2)
    assert member.chosen_logps == pytest.approx(float(ours[:5].mean()), rel=1e-5)
    assert member.margin == pytest.approx(float((chosen - rejected).mean()), rel=1e-4)
    assert member.accuracy.mean == pytest.approx(float((chosen > rejected).double().mean()))
    assert member.kl_on_pairs == pytest.approx(float(kl.mean()), rel=1e-4)
