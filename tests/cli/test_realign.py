"""The command `realign`, from a checkpoint to a table, a page and a model folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from pair_rows import COLOURS, jsonl
from tiny_folder import save_tiny
from torch.optim import SGD
from training import trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_dpo.training.saving.read
from lightning_dpo import DPOModule, PreferenceDataModule
from lightning_dpo.cli.main import main
from lightning_dpo.losses import SimPOLoss
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.training.reward_model import RewardModule

OLDER_SWEEP = Path(__file__).parents[1] / "support" / "older_sweep"
QUICK = ["--num_prompts=4", "--max_new_tokens=6", "--device=cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, pairs, and checkpoints of several kinds of training."""
    root = tmp_path_factory.mktemp("realign")
    save_tiny(root / "model")
    jsonl(root / "pairs.jsonl", COLOURS)
    (root / "judge_of_lengths.py").write_text(
        "def score(prompts, completions):\n    return [float(len(text)) for text in completions]\n"
        "def both(prompts, first, second):\n    return [0.5] * len(prompts)\n"
    )
    source = str(root / "model")
    tiny = AutoModelForCausalLM.from_pretrained(source)
    kinds: dict[str, Any] = {
        "full": DPOModule(source, optimizer=_sgd),
        "cached": DPOModule(source, reference="cached", reference_cache=str(root / "kept"), optimizer=_sgd),
        "lora": DPOModule(source, lora=LoraSettings(r=2), optimizer=_sgd),
        "object": DPOModule(tiny, reference="cached", reference_cache=str(root / "kept"), optimizer=_sgd),
        "free": DPOModule(source, reference="none", loss=SimPOLoss(), optimizer=_sgd),
        "reward": RewardModule(source, optimizer=_sgd),
    }
    for name, module in kinds.items():
        data = PreferenceDataModule(
            str(root / "pairs.jsonl"), tokenizer=source, num_processes=1, cache_dir=str(root / "cache")
        )
        keep = ModelCheckpoint(root, filename=name)
        trainer(callbacks=[keep], enable_checkpointing=True, max_epochs=4).fit(module, data)
    return root


def _sgd(params: Any) -> SGD:
    return SGD(params, lr=0.3)


@pytest.fixture(autouse=True)
def _there(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    for file in made.iterdir():
        (tmp_path / file.name).symlink_to(file)


def realign(*arguments: str) -> None:
    main(["realign", *QUICK, *arguments])


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        realign(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def table() -> list[dict[str, float]]:
    return pq.read_table("outputs/realign/realign.parquet").to_pylist()


@pytest.mark.parametrize("checkpoint", ["full.ckpt", "cached.ckpt", "lora.ckpt"])
def test_the_family_runs_from_the_reference_through_the_policy(checkpoint: str, capsys: Any) -> None:
    arguments = ["--checkpoint", checkpoint, "--data=pairs.jsonl", "--judge=judge_of_lengths.score"]
    realign(*arguments, "--scales", "0", "0.5", "1", "2")
    output = capsys.readouterr().out
    assert ("the policy without its adapter" if "lora" in checkpoint else "/model") in output
    assert max(map(len, output.splitlines())) <= 90  # the paths of the test itself are long
    assert all(name in output for name in ("accuracy", "margin", "KL", "score"))
    rows = table()
    assert [row["scale"] for row in rows] == [0.0, 0.5, 1.0, 2.0]
    assert rows[0]["accuracy"] == 0.5
    assert rows[0]["kl"] == rows[0]["margin"] == 0
    assert rows[2]["accuracy"] == 1.0
    assert 0 < rows[1]["margin"] < rows[2]["margin"] < rows[3]["margin"]
    assert 0 < rows[1]["kl_on_pairs"] < rows[2]["kl_on_pairs"]
    assert all(row["score"] > 0 for row in rows)
    assert "<!doctype html>" in Path("outputs/realign/realign.html").read_text()


@pytest.mark.parametrize("checkpoint", ["full.ckpt", "lora.ckpt"])
def test_by_weights_the_ends_are_the_same_and_a_member_is_exported(checkpoint: str) -> None:
    arguments = ["--checkpoint", checkpoint, "--data=pairs.jsonl", "--num_prompts=0"]
    realign(*arguments, "--scales", "0", "1")
    decoded = table()
    realign(*arguments, "--weights", "--scales", "0", "1", "3", "--export=member", "--export_scale=0.5")
    for ours, theirs in zip(table(), decoded, strict=False):
        assert ours == pytest.approx(theirs, abs=1e-4)
    main(["export", "--checkpoint", checkpoint, "--output=policy"])
    member, policy, base = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in ("member", "policy", "model")
    )
    for name, weight in member.items():
        torch.testing.assert_close(weight, (base[name] + policy[name]) / 2, atol=1e-6, rtol=1e-5)
    assert AutoTokenizer.from_pretrained("member").eos_token_id is not None


def test_a_member_is_exported_without_data() -> None:
    realign("--checkpoint=full.ckpt", "--weights", "--export=beyond", "--export_scale=1.5")
    assert (Path("beyond") / "config.json").is_file()
    assert not Path("outputs").exists()


def test_trials_are_drawn_beside(made: Path, tmp_path: Path) -> None:
    shutil.copytree(OLDER_SWEEP, tmp_path / "sweep")
    realign("--checkpoint=full.ckpt", "--data=pairs.jsonl", "--trials=sweep", "--scales", "0.5", "1")
    assert "trained trials" in Path("outputs/realign/realign.html").read_text()


def test_a_model_folder_is_compared_with_the_reference_that_is_named() -> None:
    main(["export", "--checkpoint=full.ckpt", "--output=policy"])
    realign("--checkpoint=policy", "--reference=model", "--data=pairs.jsonl", "--scales", "1")
    ours = table()
    realign("--checkpoint=full.ckpt", "--data=pairs.jsonl", "--scales", "1")
    assert ours[0] == pytest.approx(table()[0], abs=1e-4)


DATA, FULL = "--data=pairs.jsonl", "--checkpoint=full.ckpt"
WRONG_MODELS = [
    (["--checkpoint=none.ckpt", DATA], "`checkpoint` must be a file that the trainer saved"),
    (["--checkpoint=model", DATA], "names no reference: pass `--reference`"),
    (["--checkpoint=object.ckpt", DATA], 'checkpoint\'s ("cached") is the policy at the start'),
    (["--checkpoint=free.ckpt", DATA], 'trained without one (`reference="none"`); pass'),
    (["--checkpoint=reward.ckpt", DATA], "`checkpoint` must be of a policy"),
    ([FULL, DATA, "--reference=./no"], "`reference` cannot be loaded: "),
]
WRONG_SETTINGS = [
    ([FULL], "`--data` must name pairs to measure on, got none"),
    ([FULL, DATA, "--scales", "-1"], "`scales` must be numbers of at least 0"),
    ([FULL, "--data=none.jsonl"], "`--data` must be an existing file"),
    ([FULL, DATA, "--judge=no.such"], "`--judge` must be the dotted path"),
    ([FULL, DATA, "--judge=judge_of_lengths.both"], "`--judge` must score completions one by one"),
    ([FULL, DATA, "--trials=model"], "must be that of a sweep"),
    (
        [FULL, DATA, "--device=abacus"],
        "`--device` must be one that torch has here, such as cpu",
    ),
    ([FULL, DATA, "--num_prompts=-1"], "`--num_prompts` must not be negative"),
    ([FULL, "--export=x", "--export_scale=0.5"], "`--export` needs `--weights`"),
    ([FULL, "--weights", "--export_scale=1"], "`--export_scale` needs `--export`"),
    ([FULL, "--weights", "--export=x"], "`--export` needs `--export_scale`"),
    ([FULL, "--weights", "--export=model", "--export_scale=1"], "must be missing or empty"),
]
MISTAKES = [*WRONG_MODELS, *WRONG_SETTINGS]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_mistakes_get_one_error(arguments: list[str], words: str, capsys: Any) -> None:
    error = error_of(capsys, *arguments)
    assert error.count("error: ") == 1
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize("checkpoint", ["free.ckpt", "object.ckpt"])
def test_what_the_error_says_to_pass_helps(checkpoint: str) -> None:
    realign(
        "--checkpoint",
        checkpoint,
        "--data=pairs.jsonl",
        "--reference=model",
        "--scales",
        "1",
        "--tokenizer=model",
    )
    assert table()[0]["kl"] > 0


def test_mistakes_in_settings_are_found_before_a_model_is_loaded(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(lightning_dpo.training.saving.read, "load_model", refuse)
    for arguments, _ in WRONG_SETTINGS:
        error_of(capsys, *arguments)
