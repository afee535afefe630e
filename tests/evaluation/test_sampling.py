import pytest
import torch
from evaluation_models import EOS, MAX_NEW, PROMPT, VOCAB, Bigram, completions, logp, tiny_llama
from tiny_tokenizers import byte_level

from lightning_dpo.evaluation import end_tokens, sample_completions

MODELS = [pytest.param(lambda: tiny_llama(0), id="generate"), pytest.param(lambda: Bigram(), id="loop")]


def draw(model, prompts, **options):
    settings = {"eos_token_id": EOS, "max_new_tokens": MAX_NEW} | options
    return sample_completions(model, prompts=prompts, **settings)


@pytest.mark.parametrize("build", MODELS)
def test_frequencies_are_those_of_every_possible_completion(build):
    model, count = build(), 4000
    drawn = draw(model, [PROMPT] * count, batch_size=1000)
    counts: dict[tuple[int, ...], int] = {}
    for sample in drawn:
        key = tuple(sample.completion_ids)
        counts[key] = counts.get(key, 0) + 1
    probabilities = {tuple(c): torch.tensor(logp(model, c)).exp().item() for c in completions()}
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert set(counts) <= set(probabilities)
    for key, p in probabilities.items():
        spread = (p * (1 - p) / count) ** 0.5
        assert counts.get(key, 0) / count == pytest.approx(p, abs=5 * spread + 1e-3)


@pytest.mark.parametrize("build", MODELS)
def test_prompts_of_other_lengths_in_the_batch_change_nothing(build):
    model = build()
    prompts = [[1], [2, 3, 1, 2, 0, 3], PROMPT, [3, 3, 3], [2]]
    together = draw(model, prompts, temperature=0.0, max_new_tokens=8)
    alone = [draw(model, [p], temperature=0.0, max_new_tokens=8)[0] for p in prompts]
    assert together == alone
    assert [list(s.prompt_ids) for s in together] == prompts


@pytest.mark.parametrize("build", MODELS)
def test_greedy_takes_the_likeliest_token(build):
    model = build()
    (sample,) = draw(model, [PROMPT], temperature=0.0, max_new_tokens=1)
    scores = {token: logp(model, [token]) for token in range(VOCAB)}
    assert sample.completion_ids == [max(scores, key=scores.__getitem__)]


@pytest.mark.parametrize("build", MODELS)
def test_top_p_keeps_the_smallest_sufficient_set(build):
    model = build()
    ranked = sorted(range(VOCAB), key=lambda token: -logp(model, [token]))
    probabilities = [torch.tensor(logp(model, [token])).exp().item() for token in ranked]
    top_p = probabilities[0] + probabilities[1] / 2  # two tokens are needed
    drawn = draw(model, [PROMPT] * 300, top_p=top_p, max_new_tokens=1, batch_size=300)
    assert {s.completion_ids[0] for s in drawn} == set(ranked[:2])


@pytest.mark.parametrize("build", MODELS)
def test_low_temperature_sharpens(build):
    model = build()
    best = max(range(VOCAB), key=lambda token: logp(model, [token]))

    def share(temperature):
        drawn = draw(model, [PROMPT] * 400, temperature=temperature, max_new_tokens=1, batch_size=400)
        return sum(s.completion_ids == [best] for s in drawn) / 400

    assert share(0.05) > 0.95 > share(3.0)


@pytest.mark.parametrize("build", MODELS)
def test_completions_end_at_their_end_token(build):
    drawn = draw(build(), [PROMPT] * 200, max_new_tokens=6)
    assert {s.finished for s in drawn} == {True, False}
    for sample in drawn:
        assert EOS not in sample.completion_ids[:-1]
        assert sample.finished == (sample.completion_ids[-1] == EOS)
        assert sample.finished or len(sample.completion_ids) == 6


@pytest.mark.parametrize("build", MODELS)
def test_any_of_several_end_tokens_ends(build):
    drawn = draw(build(), [PROMPT] * 100, eos_token_id=[EOS, 3], max_new_tokens=6)
    assert {s.completion_ids[-1] for s in drawn if s.finished} == {EOS, 3}
    assert all({EOS, 3}.isdisjoint(s.completion_ids[:-1]) for s in drawn)


@pytest.mark.parametrize("build", MODELS)
def test_the_seed_decides_and_the_global_state_is_left_alone(build):
    model = build()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (draw(model, [PROMPT] * 30, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again
    assert first != other


def test_stored_generation_settings_do_not_bend_the_distribution():
    model = tiny_llama(0)
    plain = draw(model, [PROMPT] * 200)
    model.generation_config.update(
        do_sample=True, top_k=1, repetition_penalty=9.0, temperature=0.1, suppress_tokens=[0, 1]
    )
    stored = model.generation_config
    assert draw(model, [PROMPT] * 200) == plain
    assert model.generation_config is stored


def test_each_submodule_keeps_its_mode():
    model = tiny_llama(0).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    draw(model, [PROMPT])
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_values_out_of_range_are_named(options, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        draw(Bigram(), [PROMPT], **options)


def test_an_empty_prompt_is_an_error():
    with pytest.raises(ValueError, match=r"`prompts`.*index 1"):
        draw(Bigram(), [PROMPT, []])


def test_completions_also_end_with_the_tokens_that_the_model_names():
    model, tokenizer = tiny_llama(0, vocab=8), byte_level()
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = [EOS, turn]
    assert EOS in tokenizer.all_special_ids
    assert end_tokens(tokenizer, model=model) == sorted({tokenizer.eos_token_id, turn, EOS})
    model.generation_config.eos_token_id = 300  # a token of text here: the model had another tokenizer
    assert end_tokens(tokenizer, model=model) == [tokenizer.eos_token_id]
    assert end_tokens(tokenizer, model=Bigram()) == [tokenizer.eos_token_id]


def test_a_tokenizer_must_say_what_ends_a_completion():
    model = tiny_llama(0)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="`tokenizer` must have an end-of-sequence token"):
        end_tokens(byte_level(eos=None), model=model)
