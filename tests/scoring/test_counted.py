"""Tokens that do not count: in sums, lengths, gradients, the cache's keys and whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from feedback_rows import random_examples
from tiny_models import OwnNetwork, random_pairs, tiny_model
from torch.utils.data import DataLoader

from lightning_dpo.reference.cache.keys import batch_keys
from lightning_dpo.scoring.forward import ScoringPlan, score
from lightning_dpo.types import CompletionBatch, FeedbackBatch, PairBatch, PairLogps

PAIRS = random_pairs(6, seed=1)


def random_masks(lengths: list[int], *, seed: int) -> list[list[bool] | None]:
    """Some masks, each with a token at least that counts, and now and then none."""
    generator = torch.Generator().manual_seed(seed)
    masks: list[list[bool] | None] = []
    for length in lengths:
        mask = torch.rand(length, generator=generator) < 0.5
        mask[int(torch.randint(length, (), generator=generator))] = True
        masks.append(None if length % 4 == 0 else mask.tolist())
    return masks


CHOSEN = random_masks([len(pair.chosen_ids) for pair in PAIRS], seed=2)
REJECTED = random_masks([len(pair.rejected_ids) for pair in PAIRS], seed=3)


def masked_batch() -> PairBatch:
    return PairBatch.from_pairs(PAIRS, counted=list(zip(CHOSEN, REJECTED, strict=True)))


def token_logps(model: Any, prompt: Any, completion: Any) -> torch.Tensor:
    """The definition: the completion alone behind its prompt, full logits."""
    ids = torch.tensor([[*prompt, *completion]])
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    logits = output if isinstance(output, torch.Tensor) else output.logits
    logps = torch.log_softmax(logits[0, len(prompt) - 1 : -1].float(), -1)
    return logps[torch.arange(len(completion)), torch.tensor(completion)]


def by_hand(model: Any) -> PairLogps:
    columns: list[list[Any]] = [[] for _ in range(6)]
    for pair, *masks in zip(PAIRS, CHOSEN, REJECTED, strict=True):
        completions = (pair.chosen_ids, pair.rejected_ids)
        kept = [
            token_logps(model, pair.prompt_ids, ids)[[True] * len(ids) if mask is None else mask]
            for ids, mask in zip(completions, masks, strict=True)
        ]
        shorter = min(map(len, kept))
        for side, logps in enumerate(kept):
            columns[side].append(logps.sum())
            columns[2 + side].append(torch.tensor(len(logps)))
            columns[4 + side].append(logps[:shorter].sum())
    return PairLogps(*map(torch.stack, columns))


@pytest.mark.parametrize(
    ("make", "plan"),
    [
        (tiny_model, ScoringPlan("shared", chunked_head=True)),
        (tiny_model, ScoringPlan("concatenated", chunked_head=True)),
        (tiny_model, ScoringPlan("concatenated")),
        (OwnNetwork, ScoringPlan("concatenated")),
    ],
)
def test_sums_lengths_and_gradients_are_those_of_the_tokens_that_count(make, plan) -> None:
    model = make()
    found, expected = PairLogps.of(score(model, masked_batch().completions(), plan=plan)), by_hand(model)
    gradients = []
    for logps in (found, expected):
        (logps.chosen.sum() - 0.3 * logps.rejected.sum()).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    for field in PairLogps._fields[:6]:
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), atol=1e-4, rtol=0)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_confidences_are_means_over_the_tokens_that_count() -> None:
    model = tiny_model()
    plan = ScoringPlan("shared", chunked_head=True, confidences=True)
    masked = PairLogps.of(score(model, masked_batch().completions(), plan=plan))
    ids = torch.tensor([[*PAIRS[0].prompt_ids, *PAIRS[0].chosen_ids]])
    logits = model(input_ids=ids).logits[0, len(PAIRS[0].prompt_ids) - 1 : -1].log_softmax(-1)
    picked = logits[torch.arange(len(logits)), torch.tensor(PAIRS[0].chosen_ids)]
    values = (picked - (2 * logits).logsumexp(-1))[CHOSEN[0] or slice(None)]
    torch.testing.assert_close(masked.chosen_confidence[0], values.mean(), atol=1e-4, rtol=0)


def test_what_is_taken_apart_joins_again() -> None:
    batch = masked_batch().completions()
    evens, odds = (batch.select(torch.arange(start, 6, 2)) for start in (0, 1))
    model, plan = tiny_model(), ScoringPlan("shared", chunked_head=True)
    whole = score(model, batch, plan=plan)
    for start, part in ((0, evens), (1, odds)):
        kept = (batch.prompt_of % 2 == start).nonzero().squeeze(1)
        torch.testing.assert_close(score(model, part, plan=plan).logps, whole.logps[kept], atol=1e-4, rtol=0)
    joined = CompletionBatch.join([evens, odds])
    assert (
        joined.counted_lengths.tolist() == torch.cat([evens.counted_lengths, odds.counted_lengths]).tolist()
    )
    plain = PairBatch.from_pairs(PAIRS[:1]).completions()
    mixed = CompletionBatch.join([plain, evens])
    assert mixed.counted[: int(plain.completion_lengths.sum())].all()
    assert CompletionBatch.join([plain, plain]).counted is None
    only = masked_batch().chosen_completions()
    torch.testing.assert_close(score(model, only, plan=plan).logps, whole.logps[:6], atol=1e-4, rtol=0)


def test_judged_completions_keep_their_masks_with_other_prompts() -> None:
    examples = random_examples(5)
    masks = random_masks([len(example.completion_ids) for example in examples], seed=4)
    batch = FeedbackBatch.from_examples(examples, counted=masks)
    both = batch.all_completions()
    assert both.counted_lengths[5:].tolist() == both.counted_lengths[:5][batch.partners].tolist()
    assert batch.completions().counted_lengths.tolist() == [
        len(e.completion_ids) if m is None else sum(m) for e, m in zip(examples, masks, strict=True)
    ]


def test_the_mask_is_part_of_the_caches_key() -> None:
    batch = PairBatch.from_pairs(PAIRS).completions()
    keys, common = batch_keys(batch)
    every = replace(batch, counted=torch.ones(int(batch.completion_lengths.sum()), dtype=torch.bool))
    for ours, theirs in zip(batch_keys(every), (keys, common), strict=True):
        assert (ours == theirs).all()
    masked = masked_batch().completions()
    other, _ = batch_keys(masked)
    is_masked = masked.counted_lengths != masked.completion_lengths
    assert 0 < is_masked.sum() < len(batch)
    assert ((other != keys).any(axis=1) == is_masked.numpy()).all()


@pytest.mark.parametrize("mask", [[True], [False] * len(PAIRS[0].chosen_ids)])
def test_a_mask_that_does_not_fit_is_an_error(mask: list[bool]) -> None:
    with pytest.raises(ValueError, match=r"`counted` must say of each token whether it counts.*at index 0"):
        PairBatch.from_pairs(PAIRS[:1], counted=[(mask, None)])


@pytest.mark.parametrize("loss", ["DPOLoss", "LDDPO", "SimPOLoss"])
def test_a_cached_reference_trains_as_a_frozen_one(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import History, sgd, trainer

    from lightning_dpo import DPOModule
    from lightning_dpo import losses as L

    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path))
    chosen = {"LDDPO": lambda: L.LDDPO(L.DPOLoss(0.3)), "DPOLoss": lambda: L.DPOLoss(0.3)}
    runs = []
    for reference in ("frozen", "cached", "cached"):
        history = History()
        module = DPOModule(
            tiny_model(), loss=chosen.get(loss, L.SimPOLoss)(), reference=reference, optimizer=sgd
        )
        trainer(callbacks=[history], max_epochs=3, log_every_n_steps=1).fit(
            module, DataLoader([masked_batch()], batch_size=None, collate_fn=lambda batch: batch)
        )
        runs.append(history.values)
    for run in runs[1:]:
        assert run["train/loss"] == pytest.approx(runs[0]["train/loss"], abs=1e-5)
        assert run["train/logps/chosen"] == pytest.approx(runs[0]["train/logps/chosen"], abs=1e-3)
    assert runs[0]["train/loss"][-1] < runs[0]["train/loss"][0]
