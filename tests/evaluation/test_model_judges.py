"""Judges that are models: reward models trained here, classifiers with labels, implied rewards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folder import save_tiny
from tiny_models import CONFIGS
from tiny_tokenizers import CHATML, byte_level
from torch import Tensor
from training import sgd
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from lightning_dpo.evaluation import (
    ClassifierJudge,
    ImplicitRewardJudge,
    Sample,
    completion_kl,
    judge_samples,
)
from lightning_dpo.models.load import load_model
from lightning_dpo.training.reward_model import RewardModule
from lightning_dpo.types import CompletionBatch

PROMPTS = ["is it red?", "is the sky blue and the sea green?", "so?"]
COMPLETIONS = [" yes it is", " no", " who are you, hello world"]


@pytest.fixture
def reward(tmp_path: Path) -> tuple[RewardModule, Path]:
    """A reward model and the folder that it is exported to."""
    save_tiny(tmp_path / "model")
    module = RewardModule(str(tmp_path / "model"), optimizer=sgd)
    module.configure_model()
    with torch.no_grad():
        module.reward_head.weight.normal_()
    module.eval()
    return module, module.export(tmp_path / "reward")


def ids(tokenizer: Any) -> list[Sample]:
    return [
        Sample(tokenizer(p)["input_ids"], [*tokenizer(c)["input_ids"], tokenizer.eos_token_id])
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]


def trained(module: RewardModule, samples: list[Sample]) -> Tensor:
    prompts, completions = [s.prompt_ids for s in samples], [[s.completion_ids] for s in samples]
    with torch.no_grad():
        return module.rewards(CompletionBatch.from_lists(prompts, completions))


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_an_exported_reward_model_gives_the_rewards_it_was_trained_to(
    reward: tuple[RewardModule, Path], batch_size: int
) -> None:
    module, folder = reward
    expected = trained(module, ids(byte_level()))
    judge = ClassifierJudge(str(folder), batch_size=batch_size)
    torch.testing.assert_close(judge(PROMPTS, COMPLETIONS), expected, atol=1e-5, rtol=1e-5)


def test_token_ids_are_read_as_they_are_where_the_vocabulary_is_the_same(
    reward: tuple[RewardModule, Path],
) -> None:
    module, folder = reward
    cut = [Sample(s.prompt_ids, s.completion_ids[:-1], False) for s in ids(byte_level())]
    judge = ClassifierJudge(str(folder))
    found = judge_samples(judge, cut, tokenizer=byte_level())
    torch.testing.assert_close(found, trained(module, cut), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, judge(PROMPTS, COMPLETIONS))  # those end
    # A policy of another vocabulary is read as text.
    other = byte_level()
    other.add_tokens(["</other>"])
    torch.testing.assert_close(judge_samples(judge, cut, tokenizer=other), judge(PROMPTS, COMPLETIONS))


def test_long_texts_lose_their_beginning(reward: tuple[RewardModule, Path]) -> None:
    module, folder = reward
    (sample,) = ids(byte_level())[:1]
    whole = [*sample.prompt_ids, *sample.completion_ids]
    expected = trained(module, [Sample(whole[-8:-4], whole[-4:])])
    found = ClassifierJudge(str(folder), max_length=8)(PROMPTS[:1], COMPLETIONS[:1])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_conversation_is_rendered_by_the_judges_template(reward: tuple[RewardModule, Path]) -> None:
    _, folder = reward
    text = f"<|im_start|>user\n{PROMPTS[0]}<|im_end|>\n<|im_start|>assistant\n{COMPLETIONS[0]}<|im_end|>\n"
    (folder / "chat_template.jinja").write_text(CHATML)
    found = ClassifierJudge(str(folder), chat=True)(PROMPTS[:1], COMPLETIONS[:1])
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    expected = model(input_ids=torch.tensor([byte_level()(text)["input_ids"]])).logits[:, 0]
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="`chat` must be false for a judge whose tokenizer has no chat"):
        ClassifierJudge(str(folder), chat=True)(PROMPTS, COMPLETIONS)


def test_several_labels_are_judged_by_the_odds_of_one(tmp_path: Path) -> None:
    tokenizer = byte_level()
    config = LlamaConfig(
        **{
            **CONFIGS["llama"].to_dict(),
            "vocab_size": len(tokenizer),
            "id2label": {0: "bad", 1: "fine", 2: "good"},
            "label2id": {"bad": 0, "fine": 1, "good": 2},
        }
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = ClassifierJudge(str(tmp_path), label="good")(PROMPTS, COMPLETIONS)
    rows = [[*s.prompt_ids, *s.completion_ids] for s in ids(tokenizer)]
    logits = torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows]).double().softmax(-1)
    expected = (logits[:, 2] / (1 - logits[:, 2])).log().float()
    torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ClassifierJudge(str(tmp_path), label=2)(PROMPTS, COMPLETIONS), found)
    with pytest.raises(ValueError, match=r"`label` must be one of bad, fine, good, .* got None"):
        ClassifierJudge(str(tmp_path))(PROMPTS, COMPLETIONS)


def test_an_implied_reward_is_the_scaled_log_ratio(tmp_path: Path) -> None:
    for name in ("policy", "reference"):
        save_tiny(tmp_path / name)
    judge = ImplicitRewardJudge(str(tmp_path / "policy"), reference=str(tmp_path / "reference"), beta=0.3)
    models: list[Any] = [load_model(str(tmp_path / name)) for name in ("policy", "reference")]
    samples = ids(byte_level())
    expected = 0.3 * completion_kl(models[0], reference=models[1], samples=samples).logratios
    assert float(expected.abs().min()) > 1e-3
    torch.testing.assert_close(judge(PROMPTS, COMPLETIONS), expected)
    torch.testing.assert_close(judge_samples(judge, samples, tokenizer=byte_level()), expected)


def test_a_model_without_a_tokenizer_says_what_to_name(reward: tuple[RewardModule, Path]) -> None:
    _, folder = reward
    expected = ClassifierJudge(str(folder))(PROMPTS, COMPLETIONS)
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"must have its tokenizer beside its model, got .*, `tokenizer`"):
        ClassifierJudge(str(folder))(PROMPTS, COMPLETIONS)
    with pytest.raises(ValueError, match="`tokenizer` must name the judge's tokenizer, got 'nowhere/at/all'"):
        ClassifierJudge(str(folder), tokenizer="nowhere/at/all")(PROMPTS, COMPLETIONS)
    beside = folder.parent / "model"
    torch.testing.assert_close(
        ClassifierJudge(str(folder), tokenizer=str(beside))(PROMPTS, COMPLETIONS), expected
    )


def test_a_language_model_is_no_judge(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    with pytest.raises(ValueError, match=r"trained sequence classification model, .* without score\.weight"):
        ClassifierJudge(str(tmp_path / "model"))(PROMPTS, COMPLETIONS)


def test_nothing_is_loaded_before_it_is_asked_for_and_then_once(
    reward: tuple[RewardModule, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ClassifierJudge("no/such-model")  # a name alone
    loads = []
    load = AutoModelForSequenceClassification.from_pretrained
    monkeypatch.setattr(
        AutoModelForSequenceClassification,
        "from_pretrained",
        lambda *a, **k: loads.append(a) or load(*a, **k),
    )
    judge = ClassifierJudge(str(reward[1]))
    judge(PROMPTS, COMPLETIONS)
    judge(PROMPTS, COMPLETIONS)
    assert len(loads) == 1


def test_numbers_are_checked() -> None:
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        ClassifierJudge("x", batch_size=0)
    with pytest.raises(ValueError, match="`max_length` must be at least 1, got 0"):
        ClassifierJudge("x", max_length=0)
    with pytest.raises(ValueError, match="`beta` must be above 0, got beta=0"):
        ImplicitRewardJudge("x", reference="y", beta=0)


def test_vocabularies_of_other_sizes_are_one_error(tmp_path: Path) -> None:
    save_tiny(tmp_path / "policy")
    AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).save_pretrained(tmp_path / "reference")
    judge = ImplicitRewardJudge(str(tmp_path / "policy"), reference=str(tmp_path / "reference"))
    with pytest.raises(ValueError, match=r"`reference` must have the policy's vocabulary of .* got 97"):
        judge(PROMPTS, COMPLETIONS)
