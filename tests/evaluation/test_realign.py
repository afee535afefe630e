"""The family pi_ref^(1-lambda) pi^lambda, against everything that a tiny model can say."""

import math

import pytest
import torch
from evaluation_models import EOS, MAX_NEW, PROMPT, Bigram, completions, logp, samples, tiny_llama
from torch import nn

from lightning_dpo.evaluation import Sample, completion_kl, realigned_model, realigned_samples
from lightning_dpo.evaluation.kl import completion_batch
from lightning_dpo.evaluation.logits import ModelPair
from lightning_dpo.evaluation.realign import realigned_logps, score_family
from lightning_dpo.evaluation.realign.weights import WeightFamily
from lightning_dpo.models.adapter_off import AdapterOff

PAIRS = [
    pytest.param(lambda: (tiny_llama(0), tiny_llama(1)), id="llama"),
    pytest.param(lambda: (Bigram(0), Bigram(1)), id="own"),
    pytest.param(lambda: (tiny_llama(0), Bigram(1)), id="mixed"),
]


def by_hand(policy: nn.Module, reference: nn.Module, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi_lambda and log pi_ref of every completion, by definition: powers, normalised at each token."""

    @torch.no_grad()
    def table(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        logits = output if isinstance(output, torch.Tensor) else output.logits
        return logits[0].double().softmax(-1)

    ours, theirs = [], []
    for completion in completions():
        ids = torch.tensor([[*PROMPT, *completion]])
        p, q = table(policy, ids), table(reference, ids)
        member = q ** (1 - scale) * p**scale
        member /= member.sum(-1, keepdim=True)
        places = [(len(PROMPT) - 1 + k, token) for k, token in enumerate(completion)]
        ours.append(sum(math.log(member[place]) for place in places))
        theirs.append(sum(math.log(q[place]) for place in places))
    return torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("build", PAIRS)
def test_log_probabilities_and_kl_are_those_of_the_definition(build, scale):
    policy, reference = build()
    member, base = by_hand(policy, reference, scale)
    assert float(member.exp().sum()) == pytest.approx(1, abs=1e-6)  # over all that can be said
    scores = score_family(
        ModelPair(policy, reference), completion_batch(samples()), scales=[0.7, scale], chunk_elements=40
    )
    torch.testing.assert_close(scores.logps[1].double(), member, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.reference_logps.double(), base, atol=1e-5, rtol=1e-5)
    truth = float((member.exp() * (member - base)).sum())
    assert float((member.exp() * scores.kl[1].double()).sum()) == pytest.approx(truth, abs=1e-5)


@pytest.mark.parametrize("build", PAIRS)
def test_the_ends_are_the_two_models(build):
    policy, reference = build()
    scores = score_family(ModelPair(policy, reference), completion_batch(samples()), scales=[0, 1])
    compared = completion_kl(policy, reference=reference, samples=samples())
    assert torch.equal(scores.logps[0], scores.reference_logps)
    assert torch.count_nonzero(scores.kl[0]) == 0
    torch.testing.assert_close(scores.logps[1] - scores.logps[0], compared.logratios, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.kl[1], compared.kl, atol=1e-5, rtol=1e-5)
    expected = torch.tensor([logp(policy, c) for c in completions()])
    torch.testing.assert_close(scores.logps[1], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("build", PAIRS)
def test_samples_come_from_the_member(build, scale):
    policy, reference = build()
    member, base = by_hand(policy, reference, scale)
    drawn = realigned_samples(
        policy,
        reference=reference,
        prompts=[PROMPT] * 1500,
        scale=scale,
        eos_token_id=EOS,
        max_new_tokens=MAX_NEW,
        batch_size=500,
    )
    everything = completions()
    index = torch.tensor([everything.index(list(sample.completion_ids)) for sample in drawn.samples])
    torch.testing.assert_close(drawn.logps.double(), member[index], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drawn.reference_logps.double(), base[index], atol=1e-4, rtol=1e-4)
    truth = float((member.exp() * (member - base)).sum())
    assert abs(drawn.estimate.mean - truth) <= 4 * drawn.estimate.standard_error + 1e-6
    counts = torch.bincount(index, minlength=len(everything)).double()
    expected = member.exp() * len(index)
    often = expected > 5
    statistic = ((counts - expected) ** 2 / expected)[often].sum()
    freedom = int(often.sum())
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_prompts_of_several_lengths_are_padded_without_a_trace():
    policy, reference = tiny_llama(0), tiny_llama(1)
    prompts = [[1, 2, 3, 0, 2, 1][: 1 + k % 6] for k in range(12)]
    options = {"eos_token_id": EOS, "max_new_tokens": 6, "scale": 1.5}
    together = realigned_samples(policy, reference=reference, prompts=prompts, **options)
    logps = [
        score_family(
            ModelPair(policy, reference),
            completion_batch([Sample(s.prompt_ids, s.completion_ids)]),
            scales=[1.5],
        ).logps[0, 0]
        for s in together.samples
    ]
    torch.testing.assert_close(together.logps, torch.stack(logps), atol=1e-5, rtol=1e-5)


def test_steps_with_a_cache_give_what_whole_rows_give():
    policy, reference = tiny_llama(0), tiny_llama(1)
    seen = []
    member = realigned_model(policy, reference=reference, scale=1.7)
    hook = reference.register_forward_hook(lambda _m, args, kwargs, _o: seen.append(kwargs), with_kwargs=True)
    from lightning_dpo.evaluation import sample_completions

    prompts = [[1, 2, 3, 0], [2, 1], [3]]
    greedy = sample_completions(
        member, prompts=prompts, eos_token_id=EOS, max_new_tokens=8, temperature=0.0, batch_size=3
    )
    hook.remove()
    assert {kwargs["input_ids"].shape[1] for kwargs in seen[1:]} == {1}
    for prompt, sample in zip(prompts, greedy, strict=True):
        ids = list(prompt)
        for token in sample.completion_ids:
            row = torch.tensor([ids])
            assert int(member(row, torch.ones_like(row))[0, -1].argmax()) == token
            ids.append(token)


def test_tokens_that_a_model_excludes_stay_out():
    policy = torch.tensor([0.5, 0.5, 0.0, 0.0]).log()
    reference = torch.tensor([0.5, 0.0, 0.5, 0.0]).log()
    for scale in (0.5, 2.0):
        assert realigned_logps(policy, reference, scale=scale).exp().tolist() == [1, 0, 0, 0]
    assert torch.equal(realigned_logps(policy, reference, scale=1), policy)
    assert torch.equal(realigned_logps(policy, reference, scale=0), reference)


def test_an_adapter_switched_off_is_the_reference():
    peft = pytest.importorskip("peft")
    base = tiny_llama(0)
    adapted = peft.get_peft_model(tiny_llama(0), peft.LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    options = {"prompts": [PROMPT, [3]] * 8, "scale": 0.6, "eos_token_id": EOS, "max_new_tokens": 5}
    ours = realigned_samples(adapted, reference=AdapterOff(adapted), **options)
    apart = realigned_samples(adapted, reference=base, **options)
    assert [s.completion_ids for s in ours.samples] == [s.completion_ids for s in apart.samples]
    torch.testing.assert_close(ours.kl, apart.kl, atol=1e-5, rtol=1e-5)
    assert float(ours.kl.max()) > 0.01


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "embed_tokens"]])
def test_an_adapter_is_scaled_from_the_reference_to_the_policy(modules):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_llama(0), peft.LoraConfig(r=2, target_modules=modules))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    ids = torch.tensor([PROMPT])
    policy = adapted(ids).logits
    with adapted.disable_adapter():
        reference = adapted(ids).logits
    assert not torch.allclose(policy, reference, atol=0.1)
    family = WeightFamily(adapted, reference=AdapterOff(adapted))
    torch.testing.assert_close(family.at(0.0)(ids).logits, reference, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(family.at(1.0)(ids).logits, policy, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_is_no_line_of_weights_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    adapted = peft.get_peft_model(tiny_llama(0), config)
    with pytest.raises(ValueError, match=r"got .*lora_magnitude_vector.*leave `weights` out"):
        WeightFamily(adapted, reference=AdapterOff(adapted))


@pytest.mark.parametrize(
    ("scale", "came"), [(-0.5, "-0.5"), (math.nan, "nan"), (math.inf, "inf")], ids=lambda value: str(value)
)
def test_scales_that_lead_nowhere_are_refused(scale, came):
    with pytest.raises(ValueError, match=f"`scales` must be numbers of at least 0 .* got {came}"):
        realigned_model(Bigram(0), reference=Bigram(1), scale=scale)


def test_vocabularies_must_agree():
    with pytest.raises(ValueError, match="`reference` must have the policy's vocabulary of 5 tokens, got 7"):
        score_family(ModelPair(Bigram(0), Bigram(1, vocab=7)), completion_batch(samples()[:2]), scales=[0.5])
    with pytest.raises(ValueError, match="`reference` must have the policy's vocabulary of 5 tokens, got 7"):
        realigned_samples(
            tiny_llama(0), reference=tiny_llama(1, vocab=7), prompts=[PROMPT], scale=0.5, eos_token_id=EOS
        )
