import math

import pytest
import torch
from evaluation_models import EOS, MAX_NEW, PROMPT, VOCAB, Bigram, completions, logp, samples, tiny_llama
from torch import nn

from lightning_dpo.evaluation import Estimate, Sample, completion_kl, sample_completions

PAIRS = [
    pytest.param(lambda: (tiny_llama(0), tiny_llama(1)), id="llama"),
    pytest.param(lambda: (Bigram(0), Bigram(1)), id="own"),
    pytest.param(lambda: (tiny_llama(0), Bigram(1)), id="mixed"),
]


def enumerated(policy, reference):
    """KL over every possible completion, and each one's probability: the definition, without sampling."""
    log_p = torch.tensor([logp(policy, c) for c in completions()], dtype=torch.float64)
    log_q = torch.tensor([logp(reference, c) for c in completions()], dtype=torch.float64)
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-5)
    return float((log_p.exp() * (log_p - log_q)).sum()), log_p.exp(), log_p - log_q


@pytest.mark.parametrize("build", PAIRS)
def test_expectation_is_the_enumerated_kl(build):
    policy, reference = build()
    truth, probabilities, logratios = enumerated(policy, reference)
    assert truth > 0.1
    result = completion_kl(policy, reference=reference, samples=samples())
    torch.testing.assert_close(result.logratios.double(), logratios, atol=1e-5, rtol=1e-5)
    assert float((probabilities * result.kl.double()).sum()) == pytest.approx(truth, abs=1e-5)
    assert float((probabilities * result.logratios.double()).sum()) == pytest.approx(truth, abs=1e-5)
    # Entropies of next tokens add up to that of whole completions likewise.
    entropy = float(-(probabilities * probabilities.log()).sum())
    assert float((probabilities * result.entropies.double()).sum()) == pytest.approx(entropy, abs=1e-5)
    tokens = sum(len(c) for c in completions())
    assert result.entropy_per_token == pytest.approx(float(result.entropies.sum()) / tokens, rel=1e-6)


@pytest.mark.parametrize("build", PAIRS)
def test_both_estimators_find_it_from_samples(build):
    policy, reference = build()
    truth, _, _ = enumerated(policy, reference)
    drawn = sample_completions(
        policy, prompts=[PROMPT] * 1000, eos_token_id=EOS, max_new_tokens=MAX_NEW, batch_size=500
    )
    result = completion_kl(policy, reference=reference, samples=drawn, batch_size=500)
    for estimate in (result.estimate, result.monte_carlo):
        assert abs(estimate.mean - truth) < 4 * estimate.standard_error
    assert (result.kl >= 0).all()


def test_near_its_reference_a_policy_is_measured_with_less_noise():
    reference, policy = tiny_llama(0), tiny_llama(0)
    with torch.no_grad():
        policy.lm_head.weight += 0.1 * torch.randn(policy.lm_head.weight.shape)
    truth, probabilities, logratios = enumerated(policy, reference)
    assert 0.01 < truth < 1
    exact = completion_kl(policy, reference=reference, samples=samples()).kl.double()
    noise, sampled_noise = ((probabilities * (x - truth) ** 2).sum() for x in (exact, logratios))
    assert noise < 0.5 * sampled_noise


@pytest.mark.parametrize("build", [lambda: tiny_llama(0), lambda: Bigram(0)])
def test_a_model_has_no_kl_from_itself(build):
    result = completion_kl(build(), reference=build(), samples=samples())
    assert torch.count_nonzero(result.kl) == 0
    assert torch.count_nonzero(result.logratios) == 0


@pytest.mark.parametrize("build", PAIRS)
def test_batches_chunks_and_order_do_not_matter(build):
    policy, reference = build()
    mixed = [Sample([1, 2, 3, 0, 2, 1][: 1 + k % 6], s.completion_ids) for k, s in enumerate(samples())]
    whole = completion_kl(policy, reference=reference, samples=mixed, batch_size=len(mixed))
    variants = (
        completion_kl(policy, reference=reference, samples=mixed, batch_size=1),
        completion_kl(policy, reference=reference, samples=mixed, batch_size=7, chunk_elements=1),
        completion_kl(policy, reference=reference, samples=mixed, batch_size=50, chunk_elements=40),
    )
    for variant in variants:
        torch.testing.assert_close(variant.kl, whole.kl, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(variant.logratios, whole.logratios, atol=1e-5, rtol=1e-5)
    back = completion_kl(policy, reference=reference, samples=mixed[::-1])
    torch.testing.assert_close(back.kl.flip(0), whole.kl, atol=1e-5, rtol=1e-5)


def test_no_more_logits_than_asked_for_exist(monkeypatch):
    policy, reference = tiny_llama(0), tiny_llama(1)
    sizes = []
    policy.lm_head.register_forward_hook(lambda _m, _i, output: sizes.append(output.numel()))
    completion_kl(policy, reference=reference, samples=samples()[:8])
    proof = max(sizes)
    sizes.clear()
    assert proof < VOCAB * sum(len(s.completion_ids) for s in samples())
    completion_kl(policy, reference=reference, samples=samples(), batch_size=85, chunk_elements=proof)
    assert max(sizes) <= proof


def test_a_head_that_scales_and_caps_its_logits_is_followed():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    def build(seed):
        torch.manual_seed(seed)
        config = Gemma2Config(
            vocab_size=5,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            final_logit_softcapping=0.5,
            sliding_window=8,
            initializer_range=0.5,
        )
        return Gemma2ForCausalLM(config).eval()

    policy, reference = build(0), build(1)
    truth, probabilities, _ = enumerated(policy, reference)
    result = completion_kl(policy, reference=reference, samples=samples())
    assert float((probabilities * result.kl.double()).sum()) == pytest.approx(truth, abs=1e-5)


def test_tokens_that_the_policy_excludes_add_nothing():
    policy, reference = Bigram(0), Bigram(1)
    with torch.no_grad():
        policy.table[:, 3] = -math.inf
    log_p, log_q = (m.table.detach()[PROMPT[-1]].double().log_softmax(-1) for m in (policy, reference))
    kept = [0, 1, 2, 4]
    expected = float((log_p[kept].exp() * (log_p[kept] - log_q[kept])).sum())
    result = completion_kl(policy, reference=reference, samples=[Sample(PROMPT, [0])])
    assert result.kl.tolist() == pytest.approx([expected], abs=1e-5)
    excluded = completion_kl(reference, reference=policy, samples=[Sample(PROMPT, [0])])
    assert excluded.kl.tolist() == [math.inf]


def test_dropout_is_off():
    policy, reference = tiny_llama(0), tiny_llama(1)
    expected = completion_kl(policy, reference=reference, samples=samples()[:5])
    for model in (policy, reference):
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        model.train()
    result = completion_kl(policy, reference=reference, samples=samples()[:5])
    torch.testing.assert_close(result.kl, expected.kl)
    torch.testing.assert_close(result.logratios, expected.logratios)


def test_models_are_left_as_they_were():
    policy, reference = tiny_llama(0).train(), tiny_llama(1)
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    policy.model.layers[0].eval()
    modes = [module.training for module in policy.modules()]
    result = completion_kl(policy, reference=reference, samples=samples()[:3])
    assert [module.training for module in policy.modules()] == modes
    assert not result.kl.requires_grad
    assert all(p.requires_grad for p in policy.parameters())
    torch.testing.assert_close(policy.state_dict(), weights, rtol=0, atol=0)


def test_mean_and_standard_error():
    estimate = Estimate.of(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert estimate.mean == 3.0
    assert estimate.standard_error == pytest.approx(math.sqrt(14 / 3 / 4))
    assert math.isnan(Estimate.of(torch.tensor([1.0])).standard_error)


def test_wrong_arguments_are_named():
    policy: nn.Module = Bigram(0)
    with pytest.raises(ValueError, match="`samples` must hold"):
        completion_kl(policy, reference=policy, samples=[])
    with pytest.raises(ValueError, match="`samples` must have a prompt"):
        completion_kl(policy, reference=policy, samples=[Sample(PROMPT, [])])
    with pytest.raises(ValueError, match="`batch_size`"):
        completion_kl(policy, reference=policy, samples=samples(), batch_size=0)
    with pytest.raises(ValueError, match=r"`reference`.*5 tokens, got 7"):
        completion_kl(policy, reference=Bigram(0, vocab=7), samples=samples())
