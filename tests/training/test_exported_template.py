"""The chat template that a policy was trained with stays with it: in exports, checkpoints, commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from pair_rows import COLOURS, jsonl
from tiny_folder import save_tiny
from tiny_tokenizers import CHATML, EOT, TOOLS, byte_level
from torch.distributed import checkpoint as dcp
from training import sgd, trainer
from transformers import AutoTokenizer

from lightning_dpo import DPOModule, PreferenceDataModule
from lightning_dpo.cli.main import main
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.parallel.checkpoints import METADATA
from lightning_dpo.training.reward_model import RewardModule
from lightning_dpo.training.saving.export import export_checkpoint
from lightning_dpo.training.saving.model_record import RECORD_KEY
from lightning_dpo.training.saving.read import load_trained_pair

CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]}
RESULT = {"role": "tool", "content": "it is blue"}


def chat(colour: str) -> dict[str, Any]:
    """A row whose chosen completion is of several turns."""
    said = [{"role": "assistant", "content": text} for text in (f"it is {colour}", "no")]
    asked = [{"role": "user", "content": f"is it {colour}?"}]
    return {"prompt": asked, "chosen": [CALL, RESULT, said[0]], "rejected": [said[1]]}


CHATS = [chat(colour) for colour in ("red", "green", "grey", "white")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose tokenizer has a template of its own."""
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model", tokenizer=byte_level(template=CHATML))
    return tmp_path


def trained(
    rows: Any = CHATS, *, template: str | None = TOOLS, kind: Any = DPOModule, **options: Any
) -> tuple[Any, PreferenceDataModule]:
    """A module that was trained, and saved to run.ckpt."""
    data = PreferenceDataModule(
        rows, tokenizer="model", chat_template=template, batch_size=2, num_processes=1
    )
    module = kind("model", optimizer=sgd, **options)
    run = trainer(max_epochs=2)
    run.fit(module, data)
    run.save_checkpoint("run.ckpt")
    return module, data


def template_of(folder: Path | str) -> str | None:
    return AutoTokenizer.from_pretrained(folder).chat_template


def test_it_is_in_every_export(folder: Path) -> None:
    (folder / "mine.jinja").write_text(TOOLS)
    module, data = trained(template="mine.jinja")
    (folder / "mine.jinja").unlink()  # what was read is what counts
    assert template_of(module.export("out")) == TOOLS
    assert data.tokenizer.chat_template == CHATML  # the data module's own stays as it is
    assert template_of(export_checkpoint("run.ckpt", "exported")) == TOOLS
    loaded = DPOModule.load_from_checkpoint("run.ckpt")
    assert template_of(loaded.export("loaded")) == TOOLS
    content = torch.load("run.ckpt", weights_only=True)
    dcp.save({"state_dict": content.pop("state_dict")}, checkpoint_id=folder / "parts.ckpt", no_dist=True)
    torch.save(content, folder / "parts.ckpt" / METADATA)
    assert template_of(export_checkpoint("parts.ckpt", "parts")) == TOOLS
    assert template_of("model") == CHATML


@pytest.mark.parametrize(
    ("kind", "options", "merge"),
    [(DPOModule, {"lora": LoraSettings(r=2)}, False), (RewardModule, {}, True)],
    ids=["adapter", "reward model"],
)
def test_it_goes_with_adapters_and_reward_models(folder: Path, kind: Any, options: Any, merge: bool) -> None:
    module, _ = trained(kind=kind, **options)
    assert template_of(module.export("out", merge=merge)) == TOOLS
    assert template_of(export_checkpoint("run.ckpt", "exported", merge=merge)) == TOOLS


@pytest.mark.parametrize(
    ("rows", "template"), [(COLOURS, EOT), (CHATS[:1] * 2, None)], ids=["no conversations", "its own"]
)
def test_a_template_that_wrote_nothing_is_not(folder: Path, rows: Any, template: str | None) -> None:
    if template is None:  # the tokenizer's own writes conversations of two turns
        said = [{"role": "assistant", "content": text} for text in ("yes", "no")]
        asked = [{"role": "user", "content": "is it?"}]
        rows = [{"prompt": asked, "chosen": said[:1], "rejected": said[1:]}] * 2
    module, _ = trained(rows, template=template)
    assert template_of(module.export("out")) == CHATML
    assert template_of(export_checkpoint("run.ckpt", "exported")) == CHATML


def test_a_checkpoint_from_before_it_was_kept_has_the_tokenizer_s_own(folder: Path) -> None:
    trained()
    content = torch.load("run.ckpt", weights_only=True)
    del content[RECORD_KEY]["chat_template"]
    torch.save(content, "older.ckpt")
    assert template_of(export_checkpoint("older.ckpt", "exported")) == CHATML
    assert load_trained_pair("older.ckpt").tokenizer().chat_template == CHATML


def test_commands_write_conversations_with_it(folder: Path) -> None:
    trained()
    pair = load_trained_pair("run.ckpt")
    assert pair.tokenizer().chat_template == pair.tokenizer("model").chat_template == TOOLS
    jsonl(folder / "chats.jsonl", CHATS)
    quick = ["--checkpoint=run.ckpt", "--data=chats.jsonl", "--max_new_tokens=6", "--device=cpu"]
    member = ["--weights", "--export=member", "--export_scale=0.5"]
    main(["realign", *quick, *member, "--num_prompts=2", "--scales", "0", "1"])
    rows = pq.read_table("outputs/realign/realign.parquet").to_pylist()
    assert rows[1]["accuracy"] == 1.0
    assert rows[1]["margin"] > 0
    assert template_of("member") == TOOLS
