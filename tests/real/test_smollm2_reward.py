"""A reward model on a real model and real preferences, by its recipe, and the folder it is exported to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from smollm2 import FAST_PRECISION, HEAVY_AND_HERE, some_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_dpo import PreferenceDataModule
from lightning_dpo.training.base import PolicyModule
from lightning_dpo.training.saving.export import export_checkpoint
from lightning_dpo.types import PairBatch, TokenPair

RECIPE = Path(__file__).parents[2] / "configs" / "reward_model.yaml"

pytestmark = HEAVY_AND_HERE


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> tuple[Path, Any]:
    """SmolLM2 after three steps of two pairs, from the GGUF file."""
    folder = tmp_path_factory.mktemp("reward")
    source = yaml.safe_load(RECIPE.read_text())["model"]["init_args"]["policy"]
    cli = LightningCLI(
        PolicyModule,
        PreferenceDataModule,
        subclass_mode_model=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        parser_kwargs={"parser_mode": "omegaconf+"},
        args=[
            "fit",
            f"--config={RECIPE}",
            f"--trainer.precision={FAST_PRECISION}",
            *some_rows(shared_data),
            f"--data.tokenizer={source}",
            f"--data.cache_dir={folder / 'cache'}",
            "--trainer.max_steps=3",
            "--trainer.limit_val_batches=1",
            "--trainer.val_check_interval=3",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={folder}",
        ],
    )
    return folder, cli


def test_every_pair_is_scored_with_its_prompt_once(trained: tuple[Path, Any]) -> None:
    _, cli = trained
    assert cli.trainer.global_step == 3
    assert cli.model.plan().layout == "shared"
    metrics = cli.trainer.callback_metrics
    assert all(torch.isfinite(metrics[name]) for name in cli.model.logged_metrics())
    assert metrics["val/loss"] < 2


def test_the_exported_folder_gives_the_same_rewards(trained: tuple[Path, Any]) -> None:
    folder, cli = trained
    (checkpoint,) = folder.rglob("*.ckpt")
    exported = export_checkpoint(checkpoint, folder / "exported")
    model = AutoModelForSequenceClassification.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    end = tokenizer.eos_token_id
    prompt = tokenizer("Who are you?").input_ids
    answers = [[*tokenizer(text).input_ids, end] for text in (" A model.", " Go away, I do not know you.")]
    batch = PairBatch.from_pairs([TokenPair(prompt, *answers)])
    padded = tokenizer.pad({"input_ids": [prompt + answer for answer in answers]}, return_tensors="pt")
    with torch.no_grad():
        rewards = cli.model.eval().rewards(batch.completions())
        torch.testing.assert_close(model(**padded).logits.squeeze(-1), rewards, atol=1e-5, rtol=1e-5)
    # SmolLM2 pads with what ends its sequences; the folder must not, or rewards are read one token early.
    assert tokenizer.pad_token_id == model.config.pad_token_id != end
