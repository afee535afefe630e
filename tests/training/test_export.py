from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_folder import tiny_lm
from tiny_models import OwnNetwork, random_batch, tiny_model
from tiny_tokenizers import byte_level
from training import loader, sgd, trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_dpo import DPOModule, PreferenceDataModule
from lightning_dpo.losses import BCOLoss
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.scoring.forward import ScoringPlan, score
from lightning_dpo.training.saving.export import export_checkpoint
from lightning_dpo.training.saving.model_record import RECORD_KEY
from lightning_dpo.training.saving.read import load_trained_pair
from lightning_dpo.types import PairLogps

IDS = torch.arange(3, 20)[None]


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A model on disk, without a tokenizer."""
    tiny_model().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def fit(module: DPOModule, folder: Path, **options: Any) -> Path:
    keep = ModelCheckpoint(folder, filename="last")
    trainer(callbacks=[keep], enable_checkpointing=True, max_epochs=2, **options).fit(module, loader())
    return folder / "last.ckpt"


def test_a_checkpoint_holds_the_policy_once_and_no_reference(source: str, tmp_path: Path) -> None:
    path = fit(DPOModule(source, optimizer=sgd), tmp_path)
    content = torch.load(path, weights_only=True)
    assert set(content["state_dict"]) == {f"policy.{name}" for name in tiny_model().state_dict()}
    assert content[RECORD_KEY]["source"] == source


def test_training_goes_on_where_it_stopped(source: str, tmp_path: Path) -> None:
    path = fit(DPOModule(source, optimizer=sgd), tmp_path)
    resumed, straight = DPOModule(source, optimizer=sgd), DPOModule(source, optimizer=sgd)
    trainer(max_epochs=4).fit(resumed, loader(), ckpt_path=path)
    trainer(max_epochs=4).fit(straight, loader())
    # The warm-up knows the run's length, so runs of different length differ by their first steps alone.
    assert resumed.reference_model is not None
    reference = resumed.reference_model.state_dict()
    torch.testing.assert_close(reference, tiny_model().state_dict(), rtol=0, atol=0)
    assert resumed.trainer.global_step == straight.trainer.global_step == 16


def test_load_from_checkpoint(source: str, tmp_path: Path) -> None:
    trained = DPOModule(source, loss=BCOLoss(beta=0.2), optimizer=sgd)
    path = fit(trained, tmp_path)
    loaded = DPOModule.load_from_checkpoint(path, loss=BCOLoss(beta=0.2))
    torch.testing.assert_close(loaded.state_dict(), trained.state_dict(), rtol=0, atol=0)
    assert float(loaded.loss.delta) != 0


def test_lora_trains_adapters_only_and_keeps_only_them(source: str, tmp_path: Path) -> None:
    base = tiny_model().state_dict()
    module = DPOModule(source, reference="adapter", lora=LoraSettings(r=4), optimizer=sgd)
    path = fit(module, tmp_path)
    content = torch.load(path, weights_only=True)["state_dict"]
    assert content
    assert all("lora_" in name for name in content)
    assert module.reference_model is None
    plain = module.policy.get_base_model().state_dict()
    for name, value in base.items():
        kept = plain.get(name, plain.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(kept, value), name
    # The reference that was used is the base model, though the adapter has moved.
    batch, plan = random_batch(4), ScoringPlan("shared", chunked_head=True)
    policy, reference, _ = module.score(batch)
    expected = PairLogps.of(score(tiny_model(), batch.completions(), plan=plan))
    assert reference is not None
    torch.testing.assert_close(reference.chosen, expected.chosen)
    assert not torch.allclose(policy.chosen, expected.chosen, atol=1e-2)

    resumed = DPOModule(source, reference="adapter", lora=LoraSettings(r=4), optimizer=sgd)
    trainer(max_epochs=2).fit(resumed, loader(), ckpt_path=path)
    for name, value in content.items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_an_adapter_is_exported_merged_or_alone(source: str, tmp_path: Path) -> None:
    module = DPOModule(source, lora=LoraSettings(r=4), optimizer=sgd)
    path = fit(module, tmp_path)
    module.policy.eval()
    wanted = module.policy(IDS).logits
    # A base folder without a tokenizer is exported without one, and says so.
    merged = AutoModelForCausalLM.from_pretrained(export_checkpoint(path, tmp_path / "merged"))
    torch.testing.assert_close(merged(IDS).logits, wanted, atol=1e-5, rtol=1e-5)
    alone = export_checkpoint(path, tmp_path / "adapter", merge=False)
    assert not (alone / "model.safetensors").exists()
    adapted = peft.PeftModel.from_pretrained(tiny_model(), alone)
    torch.testing.assert_close(adapted(IDS).logits, wanted, atol=1e-5, rtol=1e-5)


def test_merging_an_adapter_works_on_a_copy(source: str, tmp_path: Path) -> None:
    module = DPOModule(source, lora=LoraSettings(r=4), optimizer=sgd)
    fit(module, tmp_path)
    before = {name: value.clone() for name, value in module.policy.state_dict().items()}
    wanted = module.policy.eval()(IDS).logits
    exported = AutoModelForCausalLM.from_pretrained(module.export(tmp_path / "out"))
    torch.testing.assert_close(exported(IDS).logits, wanted, atol=1e-5, rtol=1e-5)
    assert hasattr(module.policy, "disable_adapter")
    torch.testing.assert_close(module.policy.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(module.policy(IDS).logits, wanted)


def test_weights_trained_in_16_bits_are_exported_in_16_bits(source: str, tmp_path: Path) -> None:
    path = fit(DPOModule(source, dtype="bfloat16", optimizer=sgd), tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(export_checkpoint(path, tmp_path / "out"), dtype="auto")
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}


def test_the_data_modules_tokenizer_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))
    tokenizer = byte_level()
    rows = [{"prompt": f"is it {n}?", "chosen": f" yes {n}", "rejected": f" no {n}"} for n in range(4)]
    module = DPOModule(tiny_lm(tokenizer), optimizer=sgd)
    trainer().fit(module, PreferenceDataModule(rows, tokenizer=tokenizer, batch_size=2, num_processes=1))
    exported = AutoTokenizer.from_pretrained(module.export(tmp_path / "out"))
    text = "is it red?"
    assert exported(text).input_ids == tokenizer(text).input_ids


def test_the_module_exports_itself(tmp_path: Path) -> None:
    module = DPOModule(tiny_model(), optimizer=sgd)
    trainer().fit(module, loader())
    folder = module.export(tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(exported(IDS).logits, module.policy.eval()(IDS).logits)
    with pytest.raises(ValueError, match="must be missing or empty"):
        module.export(tmp_path / "out")


@pytest.mark.parametrize("ends", [[2, 7], 7], ids=str)
def test_generation_settings_are_exported_from_checkpoints_too(tmp_path: Path, ends: Any) -> None:
    """Tokens that end a turn stand beside the config, which names the end of a sequence alone."""
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    # As some are published: a temperature beside greedy decoding, of which transformers warns.
    settings = {"eos_token_id": ends, "pad_token_id": 0, "do_sample": False, "temperature": 0.6}
    file = tmp_path / "base" / "generation_config.json"
    file.write_text(json.dumps(settings))
    try:
        AutoModelForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "again")
    except ValueError:  # older versions of transformers load such settings, and write none
        file.write_text(json.dumps({**settings, "do_sample": True}))
    module = DPOModule(str(tmp_path / "base"), optimizer=sgd)
    path = fit(module, tmp_path)
    live = module.export(tmp_path / "live")
    exported = export_checkpoint(path, tmp_path / "out")
    saved = [json.loads((folder / "generation_config.json").read_text()) for folder in (live, exported)]
    assert saved[0] == saved[1]
    assert saved[1]["eos_token_id"] == ends
    assert base.config.eos_token_id == 2
    assert load_trained_pair(path).policy.generation_config.eos_token_id == ends
    # A checkpoint from before they were kept goes by the model's config.
    content = torch.load(path, weights_only=True)
    del content[RECORD_KEY]["generation"]
    torch.save(content, tmp_path / "older.ckpt")
    older = AutoModelForCausalLM.from_pretrained(export_checkpoint(tmp_path / "older.ckpt", tmp_path / "old"))
    assert older.generation_config.eos_token_id == 2


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = DPOModule(tiny_model())
    module.configure_model()

    def fail(folder: Path) -> None:
        (Path(folder) / "half").write_text("")
        raise OSError("No space left on device")

    monkeypatch.setattr(module.policy, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        module.export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a file that the trainer saved"):
        export_checkpoint(tmp_path / "none.ckpt", tmp_path / "out")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="must have been saved by DPOModule"):
        export_checkpoint(tmp_path / "other.ckpt", tmp_path / "out")
    path = fit(DPOModule(OwnNetwork(), optimizer=sgd), tmp_path)
    with pytest.raises(ValueError, match="not a Hugging Face model"):
        export_checkpoint(path, tmp_path / "out")


@pytest.mark.parametrize("content", [b"hello\n", b"", b"{}", pickle.dumps([1])])
def test_a_file_that_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"`checkpoint` must be a file that the trainer saved.*notes.txt"):
        export_checkpoint(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()
