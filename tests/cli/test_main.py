from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from data_files import write
from tiny_tokenizers import byte_level
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_dpo
from lightning_dpo import DPOModule, PreferenceDataModule
from lightning_dpo.cli.main import main
from lightning_dpo.losses import IPOLoss
from lightning_dpo.training.cli import DPOCLI

CONFIG_FOLDER = Path(__file__).parents[2] / "configs"


TINY = [
    "--model.policy=model",
    "--trainer.accelerator=cpu",
    "--data.train=pairs.jsonl",
    "--data.num_processes=1",
]


def test_an_option_wins_over_the_recipe_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(CONFIG_FOLDER / "smollm2_dpo.yaml")
    options = ["--model.loss.beta", "0.3", "--data.train=pairs.jsonl"]
    second = str(CONFIG_FOLDER / "lora.yaml")
    for arguments in (
        [*options, "--config", recipe, "--config", second],
        ["--config", recipe, *options, f"--config={second}"],
        ["--config", recipe, "--config", second, *options],
    ):
        with pytest.raises(SystemExit):
            main(["fit", *arguments, "--print_config"])
        shown = yaml.safe_load(capsys.readouterr().out)
        assert shown["model"]["loss"]["init_args"]["beta"] == 0.3
        assert shown["data"]["train"] == "pairs.jsonl"
        assert shown["model"]["lora"]["r"] == 16


def test_fit_validate_export(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["--config", str(CONFIG_FOLDER / "smollm2_dpo.yaml"), *TINY, "--data.validation_split=0.25"]
    main(["fit", *recipe, "--model.optimizer.lr=0.01", "--trainer.max_epochs=3", "--model.loss.beta=0.3"])
    (checkpoint,) = folder.rglob("*.ckpt")
    saved = yaml.safe_load(next(folder.rglob("config.yaml")).read_text())
    assert saved["model"]["loss"]["init_args"]["beta"] == 0.3
    assert saved["data"]["tokenizer"] == "model"
    capsys.readouterr()

    main(["validate", *recipe, f"--ckpt_path={checkpoint}"])
    assert "val/rewards/accuracy" in capsys.readouterr().out

    main(["export", f"--checkpoint={checkpoint}", "--output=exported"])
    assert "exported to exported" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder / "exported")
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[f"policy.{name}"]), name
    start = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
    assert tokenizer("is it red?").input_ids == byte_level()("is it red?").input_ids

    with pytest.raises(SystemExit):
        main(["export", f"--checkpoint={checkpoint}", "--output=exported"])
    assert "must be missing or empty" in capsys.readouterr().err


def test_fit_goes_on_from_a_checkpoint_with_the_command_lines_settings(folder: Path) -> None:
    main(["fit", *TINY, "--trainer.max_epochs=1"])
    (checkpoint,) = folder.rglob("*.ckpt")
    cli = DPOCLI(
        args=["fit", *TINY, "--trainer.max_epochs=2", "--model.loss.beta=0.7", f"--ckpt_path={checkpoint}"]
    )
    assert cli.trainer.current_epoch == 2
    assert cli.model.loss.beta == 0.7


@pytest.mark.parametrize("overlays", [[], ["lora.yaml"]], ids=str)
@pytest.mark.parametrize("recipe", sorted(path.name for path in CONFIG_FOLDER.glob("smollm2_*.yaml")))
def test_every_recipe_trains(folder: Path, recipe: str, overlays: list[str]) -> None:
    configs = [f"--config={CONFIG_FOLDER / name}" for name in (recipe, *overlays)]
    cli = DPOCLI(args=["fit", *configs, *TINY, "--data.validation_split=0.25"])
    assert cli.trainer.global_step == 2
    assert isinstance(cli.model.loss, IPOLoss) == ("ipo" in recipe)
    assert hasattr(cli.model.policy, "peft_config") == bool(overlays)
    if overlays:
        (checkpoint,) = folder.rglob("*.ckpt")
        names = torch.load(checkpoint, weights_only=True)["state_dict"].keys()
        assert names
        assert all("lora_" in name for name in names)


def test_every_recipe_is_complete() -> None:
    names = {path.name for path in CONFIG_FOLDER.glob("*.yaml")}
    assert {"smollm2_dpo.yaml", "smollm2_ipo.yaml", "lora.yaml"} <= names
    for name in names:
        text = (CONFIG_FOLDER / name).read_text()
        assert text.startswith("# "), name
        assert f"lightning-dpo fit --config configs/smollm2_dpo.yaml --config configs/{name}" in text or (
            f"lightning-dpo fit --config configs/{name}" in text
        ), name


def test_the_completion_monitor_is_added_as_the_readme_says(folder: Path) -> None:
    added = "--trainer.callbacks+=lightning_dpo.evaluation.CompletionMonitor"
    sizes = ["--trainer.callbacks.num_prompts=2", "--trainer.callbacks.max_new_tokens=3"]
    judge = "--trainer.callbacks.judge=lightning_dpo.demo.grammar.true_score"
    cli = DPOCLI(args=["fit", *TINY, "--data.validation_split=0.25", added, *sizes, judge])
    assert float(cli.trainer.callback_metrics["val/kl"]) >= 0
    assert 0 <= float(cli.trainer.callback_metrics["val/win_rate"]) <= 1
    assert "val/score" in cli.trainer.callback_metrics
    (path,) = folder.rglob("completions/*.jsonl")
    assert len(path.read_text().splitlines()) == 2


def test_the_progress_bar_can_be_switched_off(folder: Path) -> None:
    cli = DPOCLI(args=["fit", *TINY, "--trainer.enable_progress_bar=false", "--trainer.fast_dev_run=true"])
    assert cli.trainer.progress_bar_callback is None


def test_another_progress_bar_takes_the_place_of_the_default(folder: Path) -> None:
    other = "--trainer.callbacks+=lightning.pytorch.callbacks.TQDMProgressBar"
    cli = DPOCLI(args=["fit", *TINY, other, "--trainer.fast_dev_run=true"])
    assert type(cli.trainer.progress_bar_callback).__name__ == "TQDMProgressBar"


def test_a_csv_file_is_named_as_any_other(folder: Path) -> None:
    # Not read as a configuration, whose text would take the place of the name.
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    write(Path("pairs.csv"), rows)
    command = ["fit", "--model.policy=model", "--trainer.max_steps=1", "--trainer.accelerator=cpu"]
    main([*command, "--data.train=pairs.csv", "--data.validation=pairs.csv", "--data.num_processes=1"])
    recipe = yaml.safe_load((next(folder.rglob("config.yaml"))).read_text())
    assert (recipe["data"]["train"], recipe["data"]["validation"]) == ("pairs.csv", "pairs.csv")


def test_interpolations_see_the_command_line(folder: Path) -> None:
    (folder / "run.yaml").write_text(
        "model:\n  policy: model\n  loss:\n    class_path: lightning_dpo.losses.DPOLoss\n"
        "    init_args:\n      beta: 0.1\n  warmup_ratio: ${model.loss.init_args.beta}\n"
        "data:\n  train: pairs.jsonl\n"
    )
    cli = DPOCLI(args=["--config=run.yaml", "--model.loss.beta=0.5"], run=False)
    assert cli.model._warmup_ratio == 0.5


def test_a_module_of_ones_own(folder: Path) -> None:
    class Halved(DPOModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) / 2

    cli = DPOCLI(Halved, PreferenceDataModule, args=["fit", *TINY, "--trainer.fast_dev_run=true"])
    assert isinstance(cli.model, Halved)


@pytest.mark.parametrize(
    "command", [[], ["--help"], *([name, "--help"] for name in ("fit", "validate", "export", "report"))]
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main(command)
    assert "usage: lightning-dpo" in capsys.readouterr().out


def test_the_list_of_commands_is_light() -> None:
    code = (
        "import sys; from lightning_dpo.cli import main; main(['--help']); main(['--version']); "
        "assert not {'jsonargparse', 'torch', 'transformers', 'lightning'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    lines = shown.splitlines()
    commands = [line.split()[0] for line in lines if re.match(r"  [a-z]", line)]
    expected = [
        "fit",
        "validate",
        "precompute",
        "tune",
        "frontier",
        "report",
        "export",
        "compare",
        "realign",
        "plan",
        "demo",
    ]
    assert commands == expected
    for command in commands:  # each with an example below it
        (position,) = [i for i, line in enumerate(lines) if line.startswith(f"  {command} ")]
        assert lines[position + 1].strip().startswith(f"lightning-dpo {command}")
    assert max(map(len, lines)) <= 100
    assert lines[-1] == f"lightning-dpo {lightning_dpo.__version__}"


def test_print_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={CONFIG_FOLDER / 'smollm2_dpo.yaml'}", "--data.train=x", "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["loss"]["class_path"] == "lightning_dpo.losses.DPOLoss"


def test_importing_the_package_is_light_and_changes_nothing_in_transformers() -> None:
    """In one process, which imports torch once for all of this; the command line's room has both names."""
    code = (
        "import sys, lightning_dpo; "
        "assert not {'ray', 'jsonargparse', 'torch', 'transformers', 'lightning'} & set(sys.modules); "
        "from lightning_dpo import DPOModule; assert 'ray' not in sys.modules; "
        "import lightning_dpo.scoring.select, lightning_dpo.training.dpo; "
        "from transformers import AttentionInterface; "
        "assert not any('lightning_dpo' in name for name in AttentionInterface().keys()); "
        "from lightning_dpo.cli import main, DPOCLI; assert DPOCLI.__mro__[1].__name__ == 'LightningCLI'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
