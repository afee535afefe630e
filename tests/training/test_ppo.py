"""PPO as a module: what a rollout holds, what is trained and logged, checkpoints, and mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_jobs import PAIRS, batches, judge, module, said_without_chance
from resume_jobs import source, train
from tiny_models import OwnNetwork, random_pairs, tiny_model
from tiny_tokenizers import byte_level
from torch import Tensor
from torch.utils.data import DataLoader
from training import History, loader, trainer
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_dpo import PPOModule, PreferenceDataModule
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.training import ppo
from lightning_dpo.training.reward_model import RewardModule
from lightning_dpo.training.saving.export import export_checkpoint
from lightning_dpo.types import CompletionBatch, PairBatch


def built(**options: Any) -> PPOModule:
    made = module(**options)
    made.configure_model()
    return made


def token_logps(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """One plain forward pass."""
    ids = torch.tensor([[*prompt, *completion]])
    logps = model(input_ids=ids).logits[0].log_softmax(-1)
    return logps[torch.arange(len(prompt) - 1, ids.shape[1] - 1), ids[0, len(prompt) :]]


@torch.no_grad()
def test_what_a_rollout_holds() -> None:
    other = tiny_model(seed=1)
    made = built(reference=other, kl_coefficient=0.3, unfinished_penalty=0.5, whiten_advantages=False)
    batch = PairBatch.from_pairs(PAIRS)
    rollout = made.rollout(batch, seed=0)
    answers = torch.split(rollout.completions.completion_ids, rollout.completions.completion_lengths.tolist())
    assert {len(answer) for answer in answers} == {1, 2, 3, 4} or len(answers) == 16
    start = 0
    for number, (pair, answer) in enumerate(zip(PAIRS, answers, strict=True)):
        ids, end = answer.tolist(), start + len(answer)
        assert bool(rollout.finished[number]) == (ids[-1] == 2)
        logps = token_logps(made.policy, list(pair.prompt_ids), ids)
        reference = token_logps(other, list(pair.prompt_ids), ids)
        torch.testing.assert_close(rollout.logps[start:end], logps, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rollout.reference_logps[start:end], reference, rtol=1e-4, atol=1e-4)
        states = made.policy.model(torch.tensor([[*pair.prompt_ids, *ids]]))[0][0]
        values = states[len(pair.prompt_ids) - 1 : -1] @ made.value_head.weight[0]
        torch.testing.assert_close(rollout.values[start:end], values, rtol=1e-4, atol=1e-4)
        text = made.tokenizer().decode(ids, skip_special_tokens=True)
        score = judge([""], [text])[0] - (0.0 if ids[-1] == 2 else 0.5)
        assert float(rollout.scores[number]) == pytest.approx(score)
        assert float(rollout.kl[number]) == pytest.approx(float((logps - reference).sum()), abs=1e-3)
        # lambda-returns from the end, by the recursion of TD(lambda).
        rewards = -0.3 * (logps - reference)
        rewards[-1] += score
        result = torch.zeros(())
        for t in reversed(range(len(ids))):
            following = values[t + 1] if t + 1 < len(ids) else torch.zeros(())
            result = rewards[t] + 0.05 * following + 0.95 * result
            torch.testing.assert_close(rollout.returns[start + t], result, rtol=1e-3, atol=1e-3)
        start = end
    torch.testing.assert_close(rollout.returns - rollout.values, rollout.advantages)
    part = rollout.select(torch.tensor([1, 4]))
    assert torch.equal(part.completions.completion_ids, torch.cat([answers[1], answers[4]]))
    lengths = rollout.completions.completion_lengths.tolist()
    assert torch.equal(part.returns, torch.cat([torch.split(rollout.returns, lengths)[k] for k in (1, 4)]))


def test_a_rollout_is_without_dropout() -> None:
    made = built(disable_dropout=False, whiten_advantages=False)
    layers = [part for part in made.policy.modules() if hasattr(part, "attention_dropout")]
    assert layers
    for layer in layers:
        layer.attention_dropout = 0.5
    batch = PairBatch.from_pairs(PAIRS)
    rollouts = []
    for training in (True, True, False):
        made.policy.train(training)
        rollouts.append(made.rollout(batch, seed=0))
        assert made.policy.training == training
    for name in ("logps", "values", "reference_logps", "returns"):
        for rollout in rollouts[:2]:
            torch.testing.assert_close(getattr(rollout, name), getattr(rollouts[2], name), rtol=0, atol=0)


def test_fillers_count_nothing() -> None:
    torch.manual_seed(0)
    results = []
    for weights in ([1.0] * 8, [1.0] * 8 + [0.0] * 8):
        made = built()
        rollout = made.rollout(PairBatch.from_pairs(PAIRS[: len(weights)], weights=weights), seed=0)
        assert rollout.weights.sum() == rollout.completions.completion_lengths[:8].sum()
        counted = rollout.advantages[rollout.weights > 0]
        results.append((float(counted.mean()), float(counted.var(correction=0))))
    for mean, variance in results:
        assert mean == pytest.approx(0, abs=1e-5)
        assert variance == pytest.approx(1, abs=1e-4)


def test_a_batch_of_fillers_alone_teaches_nothing() -> None:
    fillers, pairs = (PairBatch.from_pairs(PAIRS[:8], weights=[weight] * 8) for weight in (0.0, 1.0))
    made, history = built(target_kl=0.1, kl_coefficient=0.5), History()
    start = {name: value.clone() for name, value in made.policy.state_dict().items()}
    trainer(callbacks=[history]).fit(made, DataLoader([fillers], batch_size=None))
    torch.testing.assert_close(made.policy.state_dict(), start, rtol=0, atol=0)
    assert made.kl_coefficient == 0.5
    assert not any(name.startswith(("train/ppo", "train/rollout", "train/loss")) for name in history.values)
    trainer(callbacks=[history]).fit(made, DataLoader([fillers, pairs], batch_size=None))
    assert all(value.isfinite().all() for value in made.state_dict().values())
    assert made.kl_coefficient != 0.5
    assert all(math.isfinite(values[-1]) for values in history.values.values())
    # One minibatch may be of fillers where the others are not.
    mixed = PairBatch.from_pairs(PAIRS[:2], weights=[1.0, 0.0])
    trainer().fit(made, DataLoader([mixed], batch_size=None))
    assert all(value.isfinite().all() for value in made.state_dict().values())


def test_what_is_trained_and_logged() -> None:
    made, history = built(), History()
    start = {name: value.clone() for name, value in made.state_dict().items()}
    assert made.reference_model is not None
    reference = {name: value.clone() for name, value in made.reference_model.state_dict().items()}
    run = trainer(callbacks=[history])
    run.fit(made, batches(), loader(random_pairs(5, seed=3)))
    assert run.global_step == 2 * 2 * 2
    assert all(not torch.equal(start[name], value) for name, value in made.named_parameters())
    assert all(torch.equal(reference[k], v) for k, v in made.reference_model.state_dict().items())
    logged = run.callback_metrics
    assert {name for name in logged if name.startswith("val/")} == set(PPOModule.logged_metrics())
    assert set(PPOModule.incomparable_metrics()) <= set(PPOModule.logged_metrics())
    names = ("policy_loss", "value_loss", "clip_fraction", "update_kl", "entropy", "explained_variance")
    assert {f"train/ppo/{name}" for name in (*names, "kl_coefficient")} <= set(logged)
    assert {f"train/{name}" for name in ("loss", "grad_norm", "lr", *PPOModule.metric_names)} <= set(logged)
    assert all(value.isfinite() for value in logged.values())
    kl = history.values["train/rollout/kl"]
    assert kl[0] == pytest.approx(0, abs=1e-5)  # policy and reference are equal at the start
    score, reward = (history.values[f"train/rollout/{name}"][1] for name in ("score", "reward"))
    assert reward == pytest.approx(score - 0.05 * kl[1], abs=1e-5)


def test_a_validation_is_repeated_exactly() -> None:
    made = built()
    first, second = (
        trainer().validate(made, loader(random_pairs(9, seed=3)), verbose=False)[0] for _ in range(2)
    )
    assert first == second


def test_half_precision_learns_as_full_precision_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are cast for sampling, and for each step, are not those of the steps before."""
    monkeypatch.setattr(ppo, "sample_completions", said_without_chance)
    changes = []
    for precision in ("32-true", "bf16-mixed"):
        made = built(minibatches=1, epochs_per_rollout=4, max_grad_norm=0.0)
        start = [p.detach().clone() for p in made.policy.parameters()]
        trainer(precision=precision, max_epochs=2).fit(made, batches())
        changes.append([p.detach() - s for p, s in zip(made.policy.parameters(), start, strict=True)])
    for whole, half in zip(*changes, strict=True):
        assert float((whole - half).norm()) < 0.1 * float(whole.norm())


def test_gradients_are_clipped_by_the_module() -> None:
    moved = []
    for limit in (0.0, 1e-3):
        made = built(max_grad_norm=limit)
        start = [p.detach().clone() for p in made.policy.parameters()]
        trainer().fit(made, batches())
        changes = [(p.detach() - s).norm() for p, s in zip(made.policy.parameters(), start, strict=True)]
        moved.append(float(torch.stack(changes).norm()))
    assert moved[1] <= 8 * 0.1 * 1e-3 * 1.01 < moved[0]


@pytest.mark.parametrize(("target", "sign"), [(1e-4, 1), (1e6, -1)])
def test_the_coefficient_adapts_and_is_kept(tmp_path: Path, target: float, sign: int) -> None:
    made = built(reference=tiny_model(seed=1), kl_coefficient=0.5, target_kl=target)
    run = trainer()
    run.fit(made, batches())
    assert made.kl_coefficient == pytest.approx(0.5 * (1 + sign * 0.02) ** 2)  # two rollouts
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = built(kl_coefficient=0.5, target_kl=target)
    trainer(max_epochs=1).validate(again, loader(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert again.kl_coefficient == made.kl_coefficient
    fixed = built(kl_coefficient=0.7)
    trainer(max_epochs=1).validate(fixed, loader(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert fixed.kl_coefficient == 0.7


def vowels(prompts: Any, completions: Any) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


@pytest.mark.slow
def test_from_a_checkpoint_the_rest_is_the_same(tmp_path: Path) -> None:
    model = source(tmp_path / "model")
    options = {
        "method": partial(
            PPOModule, judge=vowels, max_new_tokens=6, epochs_per_rollout=1, minibatches=2, target_kl=0.1
        ),
        "trainer_options": {"accumulate_grad_batches": 1, "max_epochs": 1},
        "data_options": {"tokens_per_batch": 400},
    }
    whole = train(model, folder=tmp_path, every=1, **options)
    saved = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    assert len(saved) > 3
    for checkpoint in (saved[0], saved[-2]):
        resumed = train(model, ckpt_path=checkpoint, **options)
        assert resumed.trainer.global_step == whole.trainer.global_step
        assert resumed.kl_coefficient == whole.kl_coefficient
        torch.testing.assert_close(whole.state_dict(), resumed.state_dict(), rtol=0, atol=0)
    exported = export_checkpoint(saved[-1], tmp_path / "exported")
    policy = AutoModelForCausalLM.from_pretrained(exported)
    assert torch.equal(policy.lm_head.weight, whole.policy.lm_head.weight)


def test_an_adapter_and_its_base_as_the_reference() -> None:
    made = built(lora=LoraSettings(r=2), reference="adapter")
    base = {name: value.clone() for name, value in made.policy.state_dict().items() if "lora_" not in name}
    trainer().fit(made, batches())
    assert all(torch.equal(value, made.policy.state_dict()[name]) for name, value in base.items())
    rollout = made.rollout(PairBatch.from_pairs(PAIRS), seed=0)
    assert float(rollout.kl.abs().max()) > 1e-5


def folder(path: Path, *, extra: str | None = None) -> str:
    """A model with a tokenizer."""
    tokenizer = byte_level()
    if extra:
        tokenizer.add_tokens([extra])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


ROWS = [{"prompt": f"is {n} even?", "chosen": " yes", "rejected": " no"} for n in range(6)]


def rewarded(path: Path, **options: Any) -> PPOModule:
    """PPO against the folder of a reward model."""
    policy = folder(path / "policy")
    made = PPOModule(policy, max_new_tokens=5, minibatches=2, epochs_per_rollout=1, **options)
    data = PreferenceDataModule(ROWS, tokenizer=policy, batch_size=6, num_processes=1)
    trainer().fit(made, data)
    return made


def test_a_reward_model_scores_the_tokens_that_were_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))
    reward = RewardModule(folder(tmp_path / "base"))
    reward.configure_model()
    reward.export(tmp_path / "reward")
    made = rewarded(tmp_path, reward_model=str(tmp_path / "reward"))
    assert not any("judge" in name for name in made.state_dict())
    pairs = random_pairs(5, vocab=90)
    rollout = made.rollout(PairBatch.from_pairs(pairs), seed=0)
    batch = rollout.completions
    with torch.no_grad():
        expected = reward.eval().rewards(
            CompletionBatch.from_lists(
                [pair.prompt_ids for pair in pairs],
                [
                    [ids.tolist()]
                    for ids in torch.split(batch.completion_ids, batch.completion_lengths.tolist())
                ],
            )
        )
    torch.testing.assert_close(rollout.scores, expected, rtol=1e-4, atol=1e-4)


def test_reward_models_that_do_not_go_with_the_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))
    reward = RewardModule(folder(tmp_path / "base", extra="<other>"))
    reward.configure_model()
    reward.export(tmp_path / "reward")
    with pytest.raises(ValueError, match=r"`reward_model` must have the policy's tokenizer.*\"<other>\""):
        rewarded(tmp_path, reward_model=str(tmp_path / "reward"))
    with pytest.raises(ValueError, match="`model` must be a trained sequence classification model"):
        rewarded(tmp_path, reward_model=folder(tmp_path / "language_model"))
    with pytest.raises(ValueError, match="`reward_model` must be the folder or hub id of a reward model"):
        rewarded(tmp_path, reward_model=str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda p, c: [float("nan")] * len(c), "`judge` must give finite scores, got nan from"),
        (lambda p, c: [[1.0]] * len(c), r"`judge` must give one score for each of 8 completions.*\(8, 1\)"),
        (lambda p, c: [1.0], r"`judge` must give one score for each of 8 completions"),
    ],
)
def test_judges_that_go_wrong(wrong: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer().fit(module(judge=wrong), batches())


def test_a_judge_that_is_a_module_is_not_trained() -> None:
    class Lengths(torch.nn.Linear):
        def forward(self, prompts: Any, completions: Any) -> Tensor:
            return super().forward(torch.tensor([[float(len(text))] for text in completions]))[:, 0]

    made = module(judge=Lengths(1, 1))
    trainer().fit(made, batches())
    assert not any("judge" in name for name in made.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": None}, "`judge`, a callable .*, must be given, got neither"),
        ({"reward_model": "x"}, "must be given, got both"),
        ({"reference": "cached"}, '`reference` must score completions .* "frozen"|which .cached. cannot'),
        ({"reference": "none"}, "`reference` must score completions"),
        ({"kl_coefficient": -0.1}, "`kl_coefficient` must be at least 0, got -0.1"),
        ({"clip_range": 0.0}, "`clip_range` must be above 0, got 0.0"),
        ({"target_kl": 0.0}, "`target_kl` must be above 0"),
        ({"gae_lambda": 1.5}, "`gae_lambda` must be at least 0 and at most 1, got 1.5"),
        ({"minibatches": 0}, "`minibatches` must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_a_network_without_hidden_states() -> None:
    with pytest.raises(ValueError, match="`policy` must show its last hidden states, which values are read"):
        PPOModule(OwnNetwork(), judge=judge)


def test_no_tokenizer_is_known() -> None:
    made = PPOModule(tiny_model(), judge=judge)
    with pytest.raises(ValueError, match="PPOModule needs a tokenizer to show the judge texts"):
        trainer().fit(made, batches())
