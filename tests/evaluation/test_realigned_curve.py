"""Members of a family on pairs, and the family by weights."""

import copy
import itertools

import peft
import pytest
import torch
from evaluation_models import EOS, MAX_NEW, PROMPT, Bigram, completions, logp, tiny_llama

from lightning_dpo.evaluation.realign import SamplingSettings, WeightFamily, realigned_curve, realigned_pairs
from lightning_dpo.models.adapter_off import AdapterOff
from lightning_dpo.types import PairBatch, TokenPair

EVERYTHING = completions()
PAIRS = [
    TokenPair(PROMPT, a, b) for a, b in itertools.islice(itertools.permutations(EVERYTHING, 2), 0, 900, 9)
]


def batches(size: int = 30, **options):
    return [PairBatch.from_pairs(PAIRS[k : k + size], **options) for k in range(0, len(PAIRS), size)]


def expected(policy, reference, scale):
    """Accuracy and means over the pairs from each completion's log-probability, one plain pass for each."""

    class Member(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            p, q = (
                m(input_ids=input_ids, attention_mask=attention_mask).logits.double().softmax(-1)
                for m in (policy, reference)
            )
            return (q ** (1 - scale) * p**scale).log()

    member = {tuple(c): logp(Member(), c) for c in EVERYTHING}
    base = {tuple(c): logp(reference, c) for c in EVERYTHING}
    ratio = {c: member[c] - base[c] for c in member}
    margins = torch.tensor([ratio[tuple(p.chosen_ids)] - ratio[tuple(p.rejected_ids)] for p in PAIRS])
    accuracy = float(((margins > 1e-9).double() + 0.5 * (margins.abs() <= 1e-9).double()).mean())
    means = [
        sum(member[tuple(getattr(p, name))] for p in PAIRS) / len(PAIRS) for name in TokenPair._fields[1:]
    ]
    return accuracy, float(margins.mean()), *means


@pytest.mark.parametrize("size", [1, 30, 100])
def test_one_pass_gives_every_member_on_the_pairs(size):
    policy, reference = tiny_llama(0), tiny_llama(1)
    passes = []
    for model in (policy, reference):
        model.model.register_forward_hook(lambda *_: passes.append(1))
    scales = [0.0, 0.4, 1.0, 2.0]
    found = realigned_pairs(policy, reference=reference, batches=batches(size), scales=scales)
    alone = len(passes)
    passes.clear()
    realigned_pairs(policy, reference=reference, batches=batches(size), scales=[0.4])
    assert len(passes) == alone  # however many members
    for member, scale in zip(found, scales, strict=True):
        accuracy, margin, chosen, rejected = expected(policy, reference, scale)
        assert member.accuracy.mean == pytest.approx(accuracy, abs=1e-9)
        assert member.margin == pytest.approx(margin, abs=1e-4)
        assert member.chosen_logps == pytest.approx(chosen, abs=1e-4)
        assert member.rejected_logps == pytest.approx(rejected, abs=1e-4)
    assert found[0].accuracy == (0.5, 0.0)  # all ties
    assert found[0].kl_on_pairs == 0 < found[1].kl_on_pairs < found[3].kl_on_pairs


def test_weights_of_pairs_count():
    policy, reference = tiny_llama(0), tiny_llama(1)
    half = [PairBatch.from_pairs(PAIRS[:40], weights=[2.0] * 20 + [0.0] * 20)]
    whole = [PairBatch.from_pairs(PAIRS[:20])]
    ours, theirs = (
        realigned_pairs(policy, reference=reference, batches=b, scales=[0.7])[0] for b in (half, whole)
    )
    assert ours.accuracy == pytest.approx(theirs.accuracy, abs=1e-6)
    assert ours.margin == pytest.approx(theirs.margin, abs=1e-5)


def test_the_line_between_weights_ends_in_the_two_models():
    policy, reference = tiny_llama(0), tiny_llama(1)
    family = WeightFamily(policy, reference=reference)
    ends = {0.0: reference, 1.0: policy}
    for scale in (1.0, 0.0, 0.5, 1.0, 2.0):
        member = family.at(scale)
        assert member is not policy
        for name, weight in member.named_parameters():
            a, b = (dict(m.named_parameters())[name] for m in (reference, policy))
            if scale in ends:
                assert torch.equal(weight, dict(ends[scale].named_parameters())[name])
            torch.testing.assert_close(weight, a + scale * (b - a), atol=1e-6, rtol=1e-6)


def test_an_adapter_is_scaled_as_the_line_between_its_merged_weights():
    torch.manual_seed(0)
    base = tiny_llama(0)
    adapted = peft.get_peft_model(tiny_llama(0), peft.LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    merged = copy.deepcopy(adapted).merge_and_unload()
    ids = torch.randint(0, 5, (2, 7))
    by_adapter, by_weights = (
        WeightFamily(adapted, reference=AdapterOff(adapted)),
        WeightFamily(merged, reference=base),
    )
    for scale in (0.0, 0.5, 1.0, 1.7):
        ours, theirs = by_adapter.at(scale)(ids).logits, by_weights.at(scale)(ids).logits
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_adapter.at(0.0)(ids).logits, base(ids).logits)


@pytest.mark.parametrize("by_weights", [False, True])
def test_the_curve_runs_from_the_reference_through_the_policy(by_weights):
    policy, reference = tiny_llama(0), tiny_llama(1)
    sampling = SamplingSettings(
        prompts=[PROMPT] * 400, eos_token_id=EOS, max_new_tokens=MAX_NEW, batch_size=400
    )
    said = []
    points = realigned_curve(
        policy,
        reference=reference,
        batches=batches(),
        scales=[0.0, 0.5, 1.0],
        sampling=sampling,
        by_weights=by_weights,
        judge=lambda drawn: torch.tensor([float(sum(s.completion_ids)) for s in drawn]),
        say=said.append,
    )
    assert [point.scale for point in points] == [0.0, 0.5, 1.0]
    assert points[0].kl.mean == pytest.approx(0, abs=1e-6)
    assert points[0].pairs.accuracy.mean == 0.5
    log_p, log_q = (
        torch.tensor([logp(m, c) for c in EVERYTHING], dtype=torch.float64) for m in (policy, reference)
    )
    for point, log_member in ((points[0], log_q), (points[2], log_p)):
        truth = float((log_member.exp() * (log_member - log_q)).sum())
        assert abs(point.kl.mean - truth) <= 4 * point.kl.standard_error + 1e-6
        score = float((log_member.exp() * torch.tensor([sum(c) for c in EVERYTHING])).sum())
        assert abs(point.score.mean - score) <= 4 * point.score.standard_error
    assert 0 < points[1].kl.mean < points[2].kl.mean
    assert points[2].pairs.margin == pytest.approx(expected(policy, reference, 1.0)[1], abs=1e-4)
    assert "sampling 400 completions at λ = 0.5 ..." in said
    assert set(points[1].row()) >= {"scale", "accuracy", "kl", "kl_error", "score", "score_error"}


def test_without_prompts_nothing_is_sampled():
    (point,) = realigned_curve(tiny_llama(0), reference=tiny_llama(1), batches=batches(), scales=[0.5])
    assert point.kl is None
    assert "kl" not in point.row()
    assert point.row()["kl_on_pairs"] > 0


def test_models_of_other_shapes_have_no_line_between_them():
    with pytest.raises(ValueError, match=r"`reference` must have the policy's arch.* \(7, 7\) for table"):
        WeightFamily(Bigram(0), reference=Bigram(1, vocab=7))


def test_no_pairs_are_an_error():
    with pytest.raises(ValueError, match="`batches` must hold at least one pair that counts, got none"):
        realigned_pairs(Bigram(0), reference=Bigram(1), batches=[], scales=[1.0])
