"""Modules and data modules that a recipe or the command line names by `class_path`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from lightning_dpo.cli.main import main
from lightning_dpo.training.cli import DPOCLI, data_class_in, model_class_in

RECIPE = Path(__file__).parents[2] / "configs" / "smollm2_dpo.yaml"
DATA = ["--data.train=pairs.jsonl", "--data.num_processes=1", "--data.validation_split=0.25"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_model_summary=false"]


def write(path: Path, **settings: Any) -> str:
    path.write_text(yaml.safe_dump(settings))
    return f"--config={path}"


@pytest.mark.parametrize(
    ("texts", "arguments", "found"),
    [
        ([], ["--model.policy=x"], None),
        (["model: {policy: x}"], [], None),
        (["model: {class_path: a.B}"], [], "a.B"),
        (["model: {class_path: a.B}", "model: {policy: x}"], [], "a.B"),
        (["model: {class_path: a.B}", "model: {class_path: c.D}"], [], "c.D"),
        (["model: {class_path: a.B}"], ["--model", "c.D"], "c.D"),
        ([], ["--model=c.D", "--model.policy=x"], "c.D"),
        ([], ["--model.class_path", "c.D"], "c.D"),
        ([], ["--model.class_path=c.D"], "c.D"),
        ([], ["--model={class_path: c.D, init_args: {lr: 1}}"], "c.D"),
        ([], ["--model={policy: x}"], None),
        (["[not, a, mapping]", "{broken"], ["--model.loss=a.Loss"], None),
    ],
)
def test_which_class_a_recipe_names(texts: list[str], arguments: list[str], found: str | None) -> None:
    assert model_class_in(texts, arguments) == found
    of_data = (
        [text.replace("model", "data") for text in texts],
        [a.replace("model", "data") for a in arguments],
    )
    assert data_class_in(*of_data) == found


def test_a_file_that_holds_a_module(tmp_path: Path) -> None:
    write(tmp_path / "flat.yaml", policy="x")
    write(tmp_path / "named.yaml", class_path="a.B")
    assert model_class_in([], [f"--model={tmp_path / 'flat.yaml'}"]) is None
    assert model_class_in([], [f"--model={tmp_path / 'named.yaml'}"]) == "a.B"


def test_a_module_of_ones_own_trains_on_the_pairs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = write(
        folder / "own.yaml",
        model={"class_path": "own_modules.PromptLengths", "init_args": {"width": 2}},
        data={"train": "pairs.jsonl", "tokenizer": "model", "validation_split": 0.25, "num_processes": 1},
    )
    cli = DPOCLI(args=["fit", named, "--model.lr=0.3", *QUIET])
    assert type(cli.model).__name__ == "PromptLengths"
    assert (cli.model.layer.out_features, cli.model.lr) == (2, 0.3)
    assert cli.trainer.global_step > 0
    (checkpoint,) = folder.rglob("*.ckpt")
    capsys.readouterr()
    main(["validate", named, f"--ckpt_path={checkpoint}", *QUIET])
    assert "val/pairs" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fit", named, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"] == {
        "class_path": "own_modules.PromptLengths",
        "init_args": {"width": 2, "lr": 0.1},
    }
    with pytest.raises(SystemExit):
        main(["precompute", named])
    assert "`precompute` needs a module with the argument `reference`" in capsys.readouterr().err


def test_a_subclass_takes_the_recipe_of_the_module_that_it_extends(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--model=own_modules.ScaledDPO", "--model.factor=0.5", "--model.policy=model"]
    cli = DPOCLI(args=["fit", f"--config={RECIPE}", *own, "--model.loss.beta=0.3", *DATA, *QUIET])
    assert type(cli.model).__name__ == "ScaledDPO"
    assert (cli.model.factor, cli.model.loss.beta) == (0.5, 0.3)
    (saved,) = folder.rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["data"]["tokenizer"] == "model"
    (checkpoint,) = folder.rglob("*.ckpt")

    again = DPOCLI(args=["validate", f"--config={write_without_trainer(saved)}", *QUIET])
    assert type(again.model).__name__ == "ScaledDPO"
    assert again.model.factor == 0.5
    capsys.readouterr()
    main(["export", f"--checkpoint={checkpoint}", "--output=exported"])
    assert AutoModelForCausalLM.from_pretrained(folder / "exported").config.model_type == "llama"


def test_a_file_of_ones_own_is_not_written_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "# my notes\nmodel: {class_path: own_modules.PromptLengths, init_args: {width: 2}}\n"
    (folder / "config.yaml").write_text(text)
    plain = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--data.tokenizer=model"]
    plain += [*DATA, *QUIET]
    DPOCLI(args=["fit", "--config=config.yaml", *plain])
    assert (folder / "config.yaml").read_text() == text
    (folder / "config.yaml").rename(folder / "own.yaml")
    DPOCLI(args=["fit", "--config=own.yaml", *plain])
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["width"] == 2


def write_without_trainer(saved: Path) -> Path:
    settings = yaml.safe_load(saved.read_text())
    path = saved.with_name("again.yaml")
    path.write_text(yaml.safe_dump({key: settings[key] for key in ("model", "data")}))
    return path


def test_the_default_loss_has_flags_in_a_subclass_too(folder: Path) -> None:
    own = ["--model.class_path=own_modules.ScaledDPO", "--model.policy=model", "--model.loss.beta=0.7"]
    cli = DPOCLI(args=[*own, *DATA], run=False)
    assert cli.model.loss.beta == 0.7


def test_data_of_ones_own(folder: Path) -> None:
    own = ["--model=own_modules.PromptLengths", "--data=own_modules.Ones", "--data.rows=3"]
    cli = DPOCLI(args=["fit", *own, *QUIET])
    assert (type(cli.datamodule).__name__, cli.trainer.global_step) == ("Ones", 3)


def test_a_named_data_module_gets_the_policys_tokenizer(folder: Path) -> None:
    named = ["--model.policy=model", "--data=lightning_dpo.PreferenceDataModule", "--data.train=pairs.jsonl"]
    cli = DPOCLI(args=named, run=False)
    assert cli.config.data.init_args.tokenizer == "model"


def test_a_module_with_its_own_data_needs_no_data_module(folder: Path) -> None:
    cli = DPOCLI(args=["fit", "--model=own_modules.BringsData", *QUIET])
    assert (cli.datamodule, cli.trainer.global_step) == (None, 4)


def test_a_module_in_the_working_directory_is_found(folder: Path, monkeypatch: Any) -> None:
    (folder / "my_project.py").write_text(
        "from own_modules import BringsData\n\nclass Mine(BringsData): pass\n"
    )
    main(["fit", "--model=my_project.Mine", "--trainer.fast_dev_run=true", *QUIET])
