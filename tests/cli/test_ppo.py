"""PPO by its recipe, from the command line: training, validation, export, and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_dpo.cli.main import main
from lightning_dpo.training.cli import DPOCLI

RECIPE = Path(__file__).parents[2] / "configs" / "ppo.yaml"
JUDGE = "--model.judge=lightning_dpo.demo.grammar.true_score"
ARGUMENTS = [
    f"--config={RECIPE}",
    "--model.policy=model",
    "--model.max_new_tokens=6",
    "--data.train=pairs.jsonl",
    "--data.num_processes=1",
    "--data.validation_split=0.25",
    "--data.batch_size=3",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
]


@pytest.mark.slow
def test_the_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = DPOCLI(args=["fit", *ARGUMENTS, JUDGE])
    assert type(cli.model).__name__ == "PPOModule"
    assert cli.trainer.global_step == 2 * 4 * 3  # two batches, four times, of three prompts
    (checkpoint,) = folder.rglob("*.ckpt")
    main(["validate", *ARGUMENTS, JUDGE, f"--ckpt_path={checkpoint}"])
    assert "val/rollout/score" in capsys.readouterr().out
    main(["export", f"--checkpoint={checkpoint}", "--output=exported"])
    exported = AutoModelForCausalLM.from_pretrained("exported")
    assert torch.equal(exported.lm_head.weight, cli.model.policy.lm_head.weight)


@pytest.mark.slow
def test_the_recipe_with_adapters(folder: Path) -> None:
    overlay = f"--config={RECIPE.with_name('lora.yaml')}"
    cli = DPOCLI(args=["fit", ARGUMENTS[0], overlay, *ARGUMENTS[1:], JUDGE])
    assert type(cli.model.reference).__name__ == "AdapterReference"
    assert cli.trainer.global_step == 24


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["`judge`", "`reward_model`", "got neither"]),
        (["--model.judge=no.such.function"], ["judge", "no.such.function"]),
        (["--model.judge=model"], ["`judge` must be the import path of a callable", "`reward_model`"]),
        (["--model.reward_model=./nothing"], ["`reward_model` must be the folder or hub id", "'./nothing'"]),
        ([JUDGE, "--trainer.gradient_clip_val=1.0"], ["`gradient_clip_val`", "`max_grad_norm`"]),
        ([JUDGE, "--trainer.accumulate_grad_batches=2"], ["`accumulate_grad_batches`", "`batch_size`"]),
        ([JUDGE, "--model.reference=cached"], ["`reference` must score completions"]),
    ],
)
def test_mistakes(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[Any]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *ARGUMENTS, *arguments])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert all(word in error for word in words), error
