"""A real policy, trained a little, at other distances from its reference, by the commands of a user."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from smollm2 import FAST_PRECISION, HEAVY_AND_HERE, some_rows
from transformers import AutoModelForCausalLM

from lightning_dpo.cli.main import main

RECIPE = Path(__file__).parents[2] / "configs" / "smollm2_dpo.yaml"

pytestmark = HEAVY_AND_HERE


def test_from_a_recipe_to_the_family_and_a_member(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    pairs = shared_data / "hh-harmless" / "train.jsonl.gz"
    main(
        [
            "fit",
            f"--config={RECIPE}",
            f"--trainer.precision={FAST_PRECISION}",
            *some_rows(shared_data, limit=24),
            "--data.tokens_per_batch=null",
            "--model.optimizer.lr=1e-5",
            "--trainer.max_steps=3",
            "--trainer.limit_val_batches=0",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
        ]
    )
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    measured = ["--checkpoint", str(checkpoint), "--data", str(pairs), "--max_length=128", "--limit=6"]
    main(["realign", *measured, "--scales", "0", "0.5", "1", "2", "--num_prompts=4", "--max_new_tokens=12"])
    rows = pq.read_table("outputs/realign/realign.parquet").to_pylist()
    assert rows[0]["kl"] == 0
    assert rows[0]["accuracy"] == 0.5
    assert 0 < rows[1]["kl_on_pairs"] < rows[2]["kl_on_pairs"] < rows[3]["kl_on_pairs"]
    assert all(row["kl"] > 0 for row in rows[1:])
    main(["realign", "--checkpoint", str(checkpoint), "--weights", "--export=beyond", "--export_scale=1.5"])
    assert AutoModelForCausalLM.from_pretrained("beyond").num_parameters() > 1e8
