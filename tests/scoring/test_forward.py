from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FALLEN_BACK, SHARED, OwnNetwork, random_batch, random_pairs, tiny_model

import lightning_dpo.scoring.masks
import lightning_dpo.scoring.select
from lightning_dpo.scoring.forward import ScoringPlan, lay_out, score
from lightning_dpo.scoring.prefix_attention import PREFIX_ATTENTION
from lightning_dpo.scoring.select import select_plan
from lightning_dpo.types import PairBatch, PairLogps, TokenPair

SHARED_PLAN = ScoringPlan("shared", chunked_head=True)
CONCATENATED_PLAN = ScoringPlan("concatenated", chunked_head=True)


def score_pairs(model: Any, batch: PairBatch, *, plan: ScoringPlan) -> PairLogps:
    return PairLogps.of(score(model, batch.completions(), plan=plan))


def one_by_one(model: Any, pairs: list[TokenPair], **options: Any) -> PairLogps:
    """The definition: every completion alone behind its prompt, full logits, no batch and no padding."""

    def total(prompt: Any, completion: Any, keep: int | None = None) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *completion]])
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        logps = torch.log_softmax(logits[0, len(prompt) - 1 : -1].float(), -1)
        picked = logps[torch.arange(len(completion)), torch.tensor(completion)]
        return picked[:keep].sum()

    shorter = [min(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    return PairLogps(
        torch.stack([total(pair.prompt_ids, pair.chosen_ids) for pair in pairs]),
        torch.stack([total(pair.prompt_ids, pair.rejected_ids) for pair in pairs]),
        torch.tensor([len(pair.chosen_ids) for pair in pairs]),
        torch.tensor([len(pair.rejected_ids) for pair in pairs]),
        torch.stack([total(p.prompt_ids, p.chosen_ids, m) for p, m in zip(pairs, shorter, strict=True)]),
        torch.stack([total(p.prompt_ids, p.rejected_ids, m) for p, m in zip(pairs, shorter, strict=True)]),
    )


def assert_same(actual: PairLogps, expected: PairLogps, *, atol: float = 1e-4) -> None:
    for field in PairLogps._fields[:6]:
        torch.testing.assert_close(
            getattr(actual, field), getattr(expected, field), atol=atol, rtol=0, msg=field
        )


def gradients(model: Any, logps: PairLogps) -> dict[str, torch.Tensor]:
    model.zero_grad()
    # Chosen and rejected with different weights, so that a swap would show.
    (logps.chosen.sum() - 0.3 * logps.rejected.sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SHARED)
def test_shared_rows_are_exact_in_value_and_gradient(name: str) -> None:
    model, pairs = tiny_model(name), random_pairs(7, longest=14)
    assert select_plan(model).plan == SHARED_PLAN
    batch = PairBatch.from_pairs(pairs)
    expected = one_by_one(model, pairs)
    wanted = gradients(model, expected)
    for plan in (SHARED_PLAN, CONCATENATED_PLAN):
        actual = score_pairs(model, batch, plan=plan)
        assert_same(actual, expected)
        got = gradients(model, actual)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", FALLEN_BACK)
def test_models_that_mix_completions_fall_back_and_stay_exact(name: str) -> None:
    model, pairs = tiny_model(name), random_pairs(5)
    found = select_plan(model)
    assert found.plan == CONCATENATED_PLAN
    assert found.reason
    assert_same(
        score_pairs(model, PairBatch.from_pairs(pairs), plan=found.plan),
        one_by_one(model, pairs, use_cache=False),
    )


def test_a_users_own_network_is_scored_through_its_logits() -> None:
    model, pairs = OwnNetwork(), random_pairs(5)
    found = select_plan(model)
    assert found.plan == ScoringPlan("concatenated", chunked_head=False)
    assert_same(score_pairs(model, PairBatch.from_pairs(pairs), plan=found.plan), one_by_one(model, pairs))


def test_the_trial_sees_a_shared_row_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the window in the mask Mistral's shared rows are wrong; the trial must notice."""
    import lightning_dpo.scoring.masks as attention

    original = attention.dense_mask
    monkeypatch.setattr(attention, "dense_mask", lambda rows, window=None: original(rows))
    found = select_plan(tiny_model("mistral"))
    assert found.plan == CONCATENATED_PLAN
    assert found.shared_error is not None
    assert found.shared_error > 1e-2


def test_the_trial_sees_a_head_that_does_more(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    model.forward = scaled
    pairs = random_pairs(4)
    found = select_plan(model)
    assert found.plan == ScoringPlan()
    assert "head" in caplog.text
    assert_same(score_pairs(model, PairBatch.from_pairs(pairs), plan=found.plan), one_by_one(model, pairs))


def test_a_layout_that_is_not_exact_is_refused_when_asked_for() -> None:
    with pytest.raises(ValueError, match=r"`layout=.*BloomForCausalLM"):
        select_plan(tiny_model("bloom"), layout="shared")
    with pytest.raises(ValueError, match=r"`layout=.*OwnNetwork"):
        select_plan(OwnNetwork(), layout="shared")
    assert select_plan(tiny_model("llama"), layout="concatenated").plan == CONCATENATED_PLAN


def test_the_trial_leaves_modes_alone() -> None:
    model = tiny_model("llama")
    model.train()
    model.model.layers[0].eval()
    select_plan(model)
    assert model.training
    assert not model.model.layers[0].training


def test_a_batch_scores_as_its_parts() -> None:
    model, pairs = tiny_model("qwen3"), random_pairs(6)
    together = score_pairs(model, PairBatch.from_pairs(pairs), plan=SHARED_PLAN)
    alone = [score_pairs(model, PairBatch.from_pairs([pair]), plan=SHARED_PLAN) for pair in pairs]
    for field in ("chosen", "rejected"):
        torch.testing.assert_close(getattr(together, field), torch.cat([getattr(a, field) for a in alone]))


def test_confidences_are_means_over_a_completion() -> None:
    model, pairs = tiny_model("llama"), random_pairs(3)
    result = score_pairs(model, PairBatch.from_pairs(pairs), plan=SHARED_PLAN._replace(confidences=True))
    assert result.chosen_confidence is not None
    for index, pair in enumerate(pairs):
        ids = torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]])
        p = torch.softmax(model(ids).logits[0, len(pair.prompt_ids) - 1 : -1], -1)
        picked = p[torch.arange(len(pair.chosen_ids)), torch.tensor(pair.chosen_ids)]
        expected = (torch.log(picked) - torch.log((p**2).sum(-1))).mean()
        torch.testing.assert_close(result.chosen_confidence[index], expected)


def test_shared_rows_compute_every_unique_token_once() -> None:
    batch = random_batch(9, longest=40)
    rows = lay_out(batch.completions(), model=tiny_model("llama"), plan=SHARED_PLAN)
    unique = int(batch.prompt_lengths.sum() + batch.chosen_lengths.sum() + batch.rejected_lengths.sum())
    assert rows.num_tokens == unique
    assert lay_out(batch.completions(), model=OwnNetwork(), plan=ScoringPlan()).num_tokens == unique + int(
        batch.prompt_lengths.sum()
    )


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gpt2", "gpt-neox", "cohere", "granite"])
def test_prefix_attention_is_exact_in_value_and_gradient_without_padding(name: str) -> None:
    model, pairs = tiny_model(name), random_pairs(7, longest=14)
    batch = PairBatch.from_pairs(pairs)
    expected = one_by_one(model, pairs)
    wanted = gradients(model, expected)
    assert select_plan(model, may_switch_attention=True).plan == SHARED_PLAN
    assert model.config._attn_implementation == PREFIX_ATTENTION
    rows = lay_out(batch.completions(), model=model, plan=SHARED_PLAN)
    assert rows.input_ids.numel() == rows.num_tokens
    actual = score_pairs(model, batch, plan=SHARED_PLAN)
    assert_same(actual, expected)
    got = gradients(model, actual)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)
    # Everything else that the model does, generation among it, goes on as before.
    ids = torch.tensor([[*pairs[0].prompt_ids]])
    plain = tiny_model(name)
    assert torch.equal(
        model.generate(ids, max_new_tokens=5, do_sample=False),
        plain.generate(ids, max_new_tokens=5, do_sample=False),
    )


@pytest.mark.parametrize("name", ["mistral", "gemma3", "qwen2-window"])
def test_models_with_windows_keep_their_masks(name: str) -> None:
    model = tiny_model(name)
    assert select_plan(model, may_switch_attention=True).plan == SHARED_PLAN
    assert model.config._attn_implementation == "sdpa"


def test_flex_attention_that_does_not_run_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_dpo.scoring.select, "FASTEST", {"cpu": ("flex_attention",)})
    tried = []

    def refuse(*_: Any, **__: Any) -> None:
        tried.append(True)
        raise RuntimeError("no kernel")

    monkeypatch.setattr(lightning_dpo.scoring.masks, "block_mask", refuse)
    model = tiny_model("llama")
    assert select_plan(model, may_switch_attention=True).plan == SHARED_PLAN
    assert tried
    assert model.config._attn_implementation == "sdpa"
    tried.clear()
    assert select_plan(model).plan == SHARED_PLAN
    assert not tried
    found = select_plan(model, may_switch_attention=True, is_compiled=True)
    assert found.plan == SHARED_PLAN
    assert "attention sdpa (not flex_attention: the blocks are compiled)" in str(found)
    assert not tried


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_cuda_runs_flex_attention_with_gradients(name: str) -> None:
    model, batch = tiny_model(name).cuda(), random_batch(6, longest=60).to("cuda")
    expected = score_pairs(model, batch, plan=SHARED_PLAN)
    wanted = gradients(model, expected)
    assert select_plan(model, may_switch_attention=True).plan == SHARED_PLAN
    assert model.config._attn_implementation == "flex_attention"
    actual = score_pairs(model, batch, plan=SHARED_PLAN)
    assert_same(actual, expected, atol=1e-3)
    torch.testing.assert_close(gradients(model, actual), wanted, atol=1e-3, rtol=1e-2)
