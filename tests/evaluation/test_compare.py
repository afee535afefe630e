"""Comparing two models' answers: against enumeration of a tiny vocabulary, and where answers do not match."""

from __future__ import annotations

import pytest
import torch
from evaluation_models import EOS, MAX_NEW, PROMPT, completions, logp, tiny_llama

from lightning_dpo.evaluation import Sample, compare_models, compare_samples


class Letters:
    """Shows token ids as letters, so that a judge can read them."""

    eos_token_id = EOS
    all_special_ids = (EOS,)

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join("abcd."[each] for each in ids if each != EOS or not skip_special_tokens)


def by_length(prompts: list[str], texts: list[str]) -> list[float]:
    return [float(len(text)) for text in texts]


def longer(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
    return [0.5 * (1 + (len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second, strict=True)]


def first_place(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
    return [1.0] * len(first)


def answers(*texts: str) -> list[Sample]:
    return [Sample(PROMPT, ["abcd.".index(letter) for letter in text]) for text in texts]


def test_the_win_rate_is_that_of_all_pairs_of_answers() -> None:
    policy, reference = tiny_llama(0), tiny_llama(1)
    every = completions()
    said = [len([token for token in each if token != EOS]) for each in every]
    tables = []
    for model in (policy, reference):
        probabilities = torch.tensor([logp(model, each) for each in every]).double().exp()
        tables.append(torch.zeros(MAX_NEW + 1).double().index_add(0, torch.tensor(said), probabilities))
    joint = tables[0][:, None] * tables[1][None, :]
    truth = float(joint.tril(-1).sum() + 0.5 * joint.diag().sum())
    # The same prompt many times over, so that the answers are independent draws.
    found = compare_models(
        policy,
        reference=reference,
        prompts=[PROMPT] * 300,
        tokenizer=Letters(),
        judge=by_length,
        samples_per_prompt=4,
        max_new_tokens=MAX_NEW,
        batch_size=600,
    )
    assert abs(found.win_rate.rate - truth) < 4 * found.win_rate.standard_error
    assert found.policy_score is not None
    expected = float((tables[0] * torch.arange(MAX_NEW + 1)).sum())
    assert abs(found.policy_score.mean - expected) < 4 * found.policy_score.standard_error
    assert found.kl is not None
    kl = 0.0
    for each in every:
        log_p, log_q = logp(policy, each), logp(reference, each)
        kl += torch.tensor(log_p).exp().item() * (log_p - log_q)
    assert abs(found.kl.mean - kl) < 4 * found.kl.standard_error
    assert (found.prompts, found.samples, len(found.answers)) == (300, 1200, 1200)


def test_every_answer_meets_every_answer_of_the_other() -> None:
    found = compare_samples(
        by_length,
        policy_samples=answers("abc", "a"),
        reference_samples=answers("ab", "a"),
        tokenizer=Letters(),
        samples_per_prompt=2,
    )
    assert found.win_rate.rate == (1 + 1 + 0 + 0.5) / 4
    assert [answer.win for answer in found.answers] == [1.0, 0.5]
    assert found.answers[0][:6] == ("bc", "abc", "ab", 3, 2, 3.0)
    assert found.kl is None


def test_a_pairwise_judge_sees_pairs_in_both_orders() -> None:
    options = {
        "policy_samples": answers("abc", "a", "ab"),
        "reference_samples": answers("ab", "ab", "ba"),
        "tokenizer": Letters(),
    }
    found = compare_samples(longer, **options)  # type: ignore[arg-type]
    assert [answer.win for answer in found.answers] == [1.0, 0.0, 0.5]
    assert found.policy_score is None
    assert found.answers[0].policy_score is None
    blind = compare_samples(first_place, **options)  # type: ignore[arg-type]
    assert [answer.win for answer in blind.answers] == [0.5, 0.5, 0.5]


def test_a_model_against_itself_is_even() -> None:
    found = compare_models(
        tiny_llama(0),
        reference=tiny_llama(0),
        prompts=[PROMPT] * 200,
        tokenizer=Letters(),
        judge=by_length,
        max_new_tokens=MAX_NEW,
        temperature=0.7,
    )
    assert found.win_rate.low < 0.5 < found.win_rate.high
    assert found.kl is None  # the policy at another temperature is another policy


def test_answers_to_other_prompts_are_one_error() -> None:
    two = answers("a", "b")
    with pytest.raises(ValueError, match="`reference_samples` must answer the prompts of `policy_samples`"):
        compare_samples(
            by_length, policy_samples=two, reference_samples=[Sample([3], [0])] * 2, tokenizer=Letters()
        )
    with pytest.raises(ValueError, match="`samples_per_prompt` must be at least 1 and divide"):
        compare_samples(
            by_length,
            policy_samples=two,
            reference_samples=two,
            tokenizer=Letters(),
            samples_per_prompt=3,
        )
