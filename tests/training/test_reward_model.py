"""A reward model on a language model: rewards, their gradients, what is logged, checkpoints and folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from resume_jobs import source, train
from tiny_models import FALLEN_BACK, SHARED, OwnNetwork, random_batch, random_pairs, tiny_model
from tiny_tokenizers import byte_level
from torch import Tensor, nn
from torch.optim import SGD
from training import PairsWithMargins, loader, trainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.models.scalar_head import ScalarHead
from lightning_dpo.training.reward_model import RewardModule
from lightning_dpo.training.saving.export import export_checkpoint, export_model
from lightning_dpo.training.saving.model_record import RECORD_KEY, ModelRecord
from lightning_dpo.types import CompletionBatch, PairBatch, TokenPair


def sgd(params: Any) -> SGD:
    return SGD(params, lr=0.05)


def built(model: nn.Module, **options: Any) -> RewardModule:
    module = RewardModule(model, optimizer=sgd, **options)
    module.configure_model()
    return module


def one_by_one(model: Any, head: ScalarHead, pairs: list[TokenPair]) -> Tensor:
    """The definition: every completion alone behind its prompt, the reward at its last token."""

    def reward(prompt: Any, completion: Any) -> Tensor:
        states = model.base_model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False)[0]
        return states[0, -1] @ head.weight[0]

    chosen = [reward(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    rejected = [reward(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    return torch.stack([*chosen, *rejected])


def grads(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [*SHARED, *FALLEN_BACK])
def test_rewards_are_those_of_completions_alone(name: str) -> None:
    module = built(tiny_model(name))
    module.eval()  # a mixture of experts may route by its training mode
    pairs = random_pairs(6)
    pairs.append(TokenPair(pairs[0].prompt_ids, [5], [7]))  # completions of one token
    batch = PairBatch.from_pairs(pairs)
    rewards = module.rewards(batch.completions())
    assert module.plan().layout == ("shared" if name in SHARED else "concatenated")
    assert rewards.dtype == torch.float32
    weights = torch.randn(len(rewards))
    (rewards * weights).sum().backward()
    ours = grads(module)
    module.zero_grad()
    expected = one_by_one(module.policy, module.reward_head, pairs)
    (expected * weights).sum().backward()
    torch.testing.assert_close(rewards, expected, atol=1e-4, rtol=1e-4)
    theirs = grads(module)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


def test_everything_but_the_unused_head_is_trained() -> None:
    untied, tied = built(tiny_model()), built(tiny_model("llama-tied"))
    assert [n for n, p in untied.named_parameters() if not p.requires_grad] == ["policy.lm_head.weight"]
    assert all(p.requires_grad for p in tied.parameters())
    before = {name: value.clone() for name, value in untied.state_dict().items()}
    trainer().fit(untied, loader())
    same = [name for name, value in untied.state_dict().items() if torch.equal(value, before[name])]
    assert same == ["policy.lm_head.weight"]


def test_more_completions_than_two() -> None:
    module = built(tiny_model())
    batch = CompletionBatch.from_lists([[3, 4]], [[[5], [6, 7], [8, 9, 10]]])
    alone = [CompletionBatch.from_lists([[3, 4]], [[c]]) for c in ([5], [6, 7], [8, 9, 10])]
    expected = torch.cat([module.rewards(one) for one in alone])
    torch.testing.assert_close(module.rewards(batch), expected, atol=1e-5, rtol=1e-5)


def test_the_loss_is_bradley_terry_s() -> None:
    module, pairs = built(tiny_model()), random_pairs(4)
    plain = module.step(PairBatch.from_pairs(pairs))
    chosen, rejected = module.rewards(PairBatch.from_pairs(pairs).completions()).chunk(2)
    expected = torch.log1p(torch.exp(rejected - chosen))
    torch.testing.assert_close(plain.losses, expected)
    torch.testing.assert_close(plain.loss, expected.mean())
    margins = [0.0, 0.5, 1.0, 2.0]
    output = module.step(PairsWithMargins.of(pairs, margins))
    expected = torch.log1p(torch.exp(rejected - chosen + torch.tensor(margins)))
    torch.testing.assert_close(output.losses, expected)
    torch.testing.assert_close(output.statistics["rewards/margin"], (chosen - rejected).detach())
    with pytest.raises(ValueError, match=r"`margins` must be at least 0, .* got -1.0"):
        module.step(PairsWithMargins.of(pairs, [0.0, -1.0, 0.0, 0.0]))


def test_accuracy_counts_a_tie_as_half() -> None:
    module = built(tiny_model())
    with torch.no_grad():
        module.reward_head.weight.zero_()
    assert module.step(random_batch(3)).statistics["rewards/accuracy"].tolist() == [0.5] * 3


def test_what_is_logged_is_what_is_said(tmp_path: Path) -> None:
    module = RewardModule(tiny_model(), optimizer=sgd)
    run = trainer(logger=CSVLogger(tmp_path), log_every_n_steps=1)
    run.fit(module, loader(), loader(random_pairs(13, seed=3), batch_size=4))
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert {name for name in logged if name.startswith("val/")} == set(RewardModule.logged_metrics())
    assert set(RewardModule.incomparable_metrics()) <= set(RewardModule.logged_metrics())
    # By hand, over the validation set at once.
    batch = PairBatch.from_pairs(random_pairs(13, seed=3))
    with torch.no_grad():
        rewards = module.rewards(batch.completions())
    chosen, rejected = rewards.chunk(2)
    assert logged["val/rewards/margin"] == pytest.approx(float((chosen - rejected).mean()), abs=1e-5)
    assert logged["val/rewards/accuracy"] == pytest.approx(float((chosen > rejected).float().mean()))
    lengths = torch.cat([batch.chosen_lengths, batch.rejected_lengths])
    correlation = torch.corrcoef(torch.stack([rewards, lengths.float()]))[0, 1]
    assert logged["val/rewards/length_correlation"] == pytest.approx(float(correlation), abs=1e-5)
    assert module.calibration is not None
    assert logged["val/calibration/ece"] == float(module.calibration.error)
    (file,) = tmp_path.rglob("reliability/step-4.json")
    curve = json.loads(file.read_text())
    assert len(curve) == 5
    assert sum(entry["share"] for entry in curve) == pytest.approx(1)


def fit(module: RewardModule, folder: Path, **options: Any) -> Path:
    keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    trainer(callbacks=[keep], enable_checkpointing=True, **options).fit(module, loader())
    return folder / "step=4.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, lora: LoraSettings | None) -> None:
    options = {"method": RewardModule, "lora": lora}
    model = source(tmp_path / "model")
    whole = train(model, folder=tmp_path, **options)
    assert whole.trainer.global_step > 8
    content = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["state_dict"]
    assert lora is None or [name for name in content if "lora_" not in name] == ["reward_head.weight"]
    resumed = train(model, ckpt_path=tmp_path / "step=5.ckpt", **options)
    assert resumed.trainer.global_step == whole.trainer.global_step
    torch.testing.assert_close(whole.state_dict(), resumed.state_dict(), rtol=0, atol=0)


def padded(pairs: list[TokenPair], *, pad: int) -> dict[str, Tensor]:
    rows = [[*p.prompt_ids, *p.chosen_ids] for p in pairs] + [[*p.prompt_ids, *p.rejected_ids] for p in pairs]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def rewards_of_folder(folder: Path, pairs: list[TokenPair]) -> Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_labels == 1
    with torch.no_grad():
        return model(**padded(pairs, pad=model.config.pad_token_id)).logits.squeeze(-1)


@pytest.mark.parametrize("by", ["module", "checkpoint"])
@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2-window", "gemma2", "gpt-neox", "mpt"])
def test_the_exported_folder_gives_the_same_rewards(
    name: str, lora: LoraSettings | None, by: str, tmp_path: Path
) -> None:
    if lora is not None and name not in ("llama", "gpt-neox"):
        pytest.skip("adapters are exported alike for all")
    model = tiny_model(name)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "base")  # an adapter alone is put on what it names
    module = RewardModule(model if lora is None else str(tmp_path / "base"), optimizer=sgd, lora=lora)
    checkpoint = fit(module, tmp_path)
    if by == "module":
        folder = module.export(tmp_path / "out")
    else:
        folder = export_checkpoint(checkpoint, tmp_path / "out")
    pairs = random_pairs(5, seed=7)
    with torch.no_grad():
        expected = module.eval().rewards(PairBatch.from_pairs(pairs).completions())
    torch.testing.assert_close(rewards_of_folder(folder, pairs), expected, atol=1e-5, rtol=1e-5)
    # Exporting changed nothing: the module goes on.
    assert module.policy.get_output_embeddings() is not None
    torch.testing.assert_close(module.rewards(PairBatch.from_pairs(pairs).completions()), expected)


def test_rewards_are_read_at_the_end_although_padding_ends_sequences_too(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    eos = tokenizer.eos_token_id
    model = tiny_model()
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = model.config.eos_token_id = eos
    module = built(model)
    folder = export_model(
        module.policy, tmp_path / "out", tokenizer=tokenizer, reward_head=module.reward_head_weight()
    )
    saved = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == eos  # the user's own is as it was
    assert saved.pad_token_id != eos
    pairs = [TokenPair(p.prompt_ids, [*p.chosen_ids, eos], [*p.rejected_ids, eos]) for p in random_pairs(5)]
    with torch.no_grad():
        expected = module.rewards(PairBatch.from_pairs(pairs).completions())
    torch.testing.assert_close(rewards_of_folder(folder, pairs), expected, atol=1e-5, rtol=1e-5)


def test_an_older_record_means_a_language_model() -> None:
    assert ModelRecord(**{"source": None, "config": None, "lora": None}).reward_head is None


def test_the_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    path = fit(RewardModule(tiny_model(), optimizer=sgd), tmp_path)
    content = torch.load(path, weights_only=True)
    assert content[RECORD_KEY]["reward_head"] in content["state_dict"]


class Offering(OwnNetwork):
    """A network that offers hidden states; shared prompts are not for it, as it reads from left to right."""

    def hidden_states(self, input_ids: Tensor, *, position_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.cell(self.embed(input_ids))[0]

    def output_head(self) -> nn.Module:
        return self.head


class Misleading(Offering):
    def output_head(self) -> nn.Module:
        return nn.Linear(16, 97)


def test_a_network_of_one_s_own_may_offer_its_hidden_states(tmp_path: Path) -> None:
    module = RewardModule(Offering(), optimizer=sgd)
    trainer().fit(module, loader())
    assert module.plan().layout == "concatenated"
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == [
        "policy.head.weight",
        "policy.head.bias",
    ]
    with pytest.raises(ValueError, match="export writes Hugging Face models, got Offering"):
        module.export(tmp_path / "out")


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`policy` must show its last hidden states.*got OwnNetwork"):
        RewardModule(OwnNetwork())
    with pytest.raises(ValueError, match=r"`policy` must offer the hidden states.*those of Misleading"):
        built(Misleading()).plan()
    module = built(tiny_model("cohere"))
    with pytest.raises(ValueError, match="must be PairBatch, got CompletionBatch"):
        module.step(CompletionBatch.from_lists([[3]], [[[4]]]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="transformers has none for CohereForCausalLM"):
        module.export(tmp_path / "out")
    with pytest.raises(ValueError, match="`merge=False` writes an adapter alone"):
        built(tiny_model(), lora=LoraSettings(r=2)).export(tmp_path / "out", merge=False)
    assert not (tmp_path / "out").exists()
