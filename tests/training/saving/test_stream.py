"""Checkpoint folders become the same files as whole models do, without a whole model in memory."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tiny_models import CONFIGS, tiny_model
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.profiler import ProfilerActivity, profile
from training import loader, sgd, trainer

from lightning_dpo import DPOModule
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.parallel.checkpoint_reader import FolderReader
from lightning_dpo.parallel.checkpoints import METADATA
from lightning_dpo.training.saving import export as module_under_test
from lightning_dpo.training.saving.export import export_checkpoint
from lightning_dpo.training.saving.stream import NotInPartsError, write_in_parts


def on_meta(model: Any) -> Any:
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)


def tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size", ["1GB", "15KB"])
@pytest.mark.parametrize("name", CONFIGS)
def test_files_are_those_of_save_pretrained(tmp_path: Path, name: str, size: str) -> None:
    """Byte for byte: tied weights, experts that files hold apart, the index, the configuration."""
    model = tiny_model(name)
    state = model.state_dict()
    (tmp_path / "parts").mkdir()
    write_in_parts(
        on_meta(model),
        tmp_path / "parts",
        read=lambda names: {name: state[name].clone() for name in names},
        max_shard_size=size,
    )
    model.save_pretrained(tmp_path / "whole", max_shard_size=size)
    parts, whole = tensors(tmp_path / "parts"), tensors(tmp_path / "whole")
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[key], value) for key, value in whole.items())
    if (name, size) != ("qwen3-next", "15KB"):  # transformers keeps what was one tensor in one file
        assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in state.items())


def as_folder(file: Path, folder: Path) -> Path:
    """A checkpoint as FSDP2 leaves it, with the content of a file."""
    content = torch.load(file, weights_only=True)
    dcp.save({"state_dict": content.pop("state_dict")}, checkpoint_id=folder, no_dist=True)
    torch.save(content, folder / METADATA)
    return folder


def saved(tmp_path: Path, policy: Any = None, **options: Any) -> tuple[Path, Path]:
    """One checkpoint as a file and as a folder."""
    tiny_model("llama-tied").save_pretrained(tmp_path / "base")
    module = DPOModule(policy or str(tmp_path / "base"), optimizer=sgd, **options)
    run = trainer()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "run.ckpt")
    return tmp_path / "run.ckpt", as_folder(tmp_path / "run.ckpt", tmp_path / "folder.ckpt")


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_folder_is_exported_as_a_file_is(tmp_path: Path, size: str) -> None:
    file, folder = saved(tmp_path)
    whole = export_checkpoint(file, tmp_path / "whole", max_shard_size=size)
    parts = export_checkpoint(folder, tmp_path / "parts", max_shard_size=size)
    assert contents(parts) == contents(whole)
    assert len(list(parts.glob("*.safetensors"))) == (1 if size == "5GB" else 4)
    model, other = (hf.AutoModelForCausalLM.from_pretrained(path) for path in (parts, whole))
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(ids).logits, other(ids).logits)
    assert not torch.equal(model(ids).logits, tiny_model("llama-tied")(ids).logits)


def test_generation_settings_of_a_folder_are_exported(tmp_path: Path) -> None:
    model = tiny_model("llama-tied")
    model.generation_config.eos_token_id = [2, 7]
    file, folder = saved(tmp_path, model)
    whole, parts = export_checkpoint(file, tmp_path / "whole"), export_checkpoint(folder, tmp_path / "parts")
    assert contents(parts) == contents(whole)
    assert hf.GenerationConfig.from_pretrained(parts).eos_token_id == [2, 7]


def peak_bytes(events: Iterable[dict[str, Any]]) -> int:
    """The most that tensors took at once, of a profile's allocations."""
    held = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def test_one_file_and_one_weight_are_in_memory(tmp_path: Path) -> None:
    config = hf.LlamaConfig(
        vocab_size=3000, hidden_size=128, intermediate_size=344, num_hidden_layers=6, num_attention_heads=4
    )
    torch.manual_seed(0)
    _, folder = saved(tmp_path, hf.AutoModelForCausalLM.from_config(config))
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        exported = export_checkpoint(folder, tmp_path / "out", max_shard_size=2_000_000)
    seen.export_chrome_trace(str(tmp_path / "trace.json"))
    peak = peak_bytes(json.loads((tmp_path / "trace.json").read_text())["traceEvents"])
    weights = tensors(exported)
    total = sum(value.nbytes for value in weights.values())
    largest = max(value.nbytes for value in weights.values())
    files = [path.stat().st_size for path in exported.glob("*.safetensors")]
    assert largest == 4 * 3000 * 128
    assert len(files) > 4
    assert max(files) < peak <= 2_000_000 + largest + 100_000  # and what a model's buffers take
    assert total > 2 * peak


def test_adapters_are_made_whole(tmp_path: Path) -> None:
    file, folder = saved(tmp_path, lora=LoraSettings(r=2))
    whole, other = (export_checkpoint(path, tmp_path / path.stem) for path in (file, folder))
    assert contents(whole) == contents(other)


def test_weights_that_files_hold_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made whole in memory, as before."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotInPartsError("Model")

    file, folder = saved(tmp_path)
    monkeypatch.setattr(module_under_test, "write_in_parts", refuse)
    assert contents(export_checkpoint(folder, tmp_path / "a")) == contents(
        export_checkpoint(file, tmp_path / "b")
    )


def test_mistakes_are_found_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"`max_shard_size` must be a number of bytes, .* got 'five'"):
        export_checkpoint(tmp_path / "none", tmp_path / "out", max_shard_size="five")
    _, folder = saved(tmp_path)
    content = torch.load(folder / METADATA, weights_only=True)
    config = json.loads(content["lightning_dpo"]["config"])
    content["lightning_dpo"]["config"] = json.dumps({**config, "num_hidden_layers": 3})
    torch.save(content, folder / METADATA)
    monkeypatch.setattr(FolderReader, "read", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="weights are not those of its model"):
        export_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
