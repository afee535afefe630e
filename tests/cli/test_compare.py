"""`lightning-dpo compare`, from checkpoints and folders, and what it says of mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pair_rows import jsonl
from tiny_folder import save_tiny
from training import sgd, trainer
from transformers import AutoModelForCausalLM

from lightning_dpo import DPOModule, PreferenceDataModule
from lightning_dpo.cli.main import main
from lightning_dpo.evaluation.compare import sample_reference
from lightning_dpo.models.adapter_off import AdapterOff
from lightning_dpo.models.lora import LoraSettings, apply_lora
from lightning_dpo.training.reward_model import RewardModule

COLOURS = ("red", "green", "grey", "white", "pink", "brown")
ROWS = [
    {"prompt": f"is it {colour}?", "chosen": f" yes {n}", "rejected": f" no {n}"}
    for colour in COLOURS
    for n in range(2)
]
SMALL = ["--data=pairs.jsonl", "--max_new_tokens=6", "--device=cpu"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    jsonl(tmp_path / "pairs.jsonl", ROWS)
    (tmp_path / "my_module.py").write_text(
        "def judge(prompts, completions):\n    return [float(len(text)) for text in completions]\n"
        "def nan(prompts, completions):\n    return [float('nan')] * len(prompts)\n"
        "def second(prompts, first, second):\n    return [0.0] * len(prompts)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def checkpoint(path: str, *, kind: Any = DPOModule, policy: Any = "model", **options: Any) -> Any:
    """A run of three steps."""
    data = PreferenceDataModule(ROWS, tokenizer="model", batch_size=4, num_processes=1)
    run = trainer(max_steps=3)
    module = kind(policy, optimizer=sgd, **options)
    run.fit(module, data)
    run.save_checkpoint(path)
    return module


def test_a_checkpoint_is_compared_with_what_it_was_trained_from(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint("last.ckpt")
    capsys.readouterr()
    call = ["compare", "--checkpoint=last.ckpt", *SMALL, "--judge=my_module.judge"]
    main([*call, "--samples=20", "--out=out/c.json"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "policy against reference, judged by judge" in shown
    result = json.loads((folder / "out/c.json").read_text())
    assert f"{100 * result['win_rate']['rate']:.1f} %" in shown
    assert f"{result['kl']['mean']:.2f}" in shown
    # Six prompts, each once in the data twice: three answers to each make up 20 as nearly as can be.
    assert (result["prompts"], result["samples"], len(result["answers"])) == (6, 18, 18)
    main([*call, "--samples=4", "--judge=my_module.second", "--out=c.parquet"])
    table = pq.read_table(folder / "c.parquet")
    assert table.column("win").to_pylist() == [0.5] * 4  # it goes by the place alone
    assert json.loads(table.schema.metadata[b"comparison"])["policy_score"] is None


def test_an_adapters_base_is_its_reference(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint("last.ckpt", lora=LoraSettings(r=4))
    capsys.readouterr()
    main(
        [
            "compare",
            "--checkpoint=last.ckpt",
            *SMALL,
            "--judge=my_module.judge",
            "--samples=6",
            "--out=c.json",
        ]
    )
    result = json.loads((folder / "c.json").read_text())
    assert result["kl"]["mean"] > 1e-4
    drawn = {}
    for name in ("base", "adapter"):
        model: Any = AutoModelForCausalLM.from_pretrained("model")
        reference = model if name == "base" else AdapterOff(apply_lora(model, LoraSettings(r=4)))
        drawn[name] = sample_reference(reference, prompts=[[5, 6, 7]] * 4, eos_token_id=1, max_new_tokens=6)
    assert drawn["base"] == drawn["adapter"]


def test_exported_folders_and_reward_models_are_taken(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint("last.ckpt").export("exported")
    checkpoint("reward.ckpt", kind=RewardModule).export("reward")
    capsys.readouterr()
    more = ["--reference=model", "--judge=./reward", "--samples=6"]
    main(["compare", "--checkpoint=exported", *SMALL, *more])
    assert "judged by ClassifierJudge" in capsys.readouterr().out
    judge = {"class_path": "ImplicitRewardJudge", "init_args": {"policy": "exported", "reference": "model"}}
    judge["class_path"] = f"lightning_dpo.evaluation.{judge['class_path']}"
    main(["compare", "--checkpoint=exported", *SMALL, *more, f"--judge={json.dumps(judge)}"])
    assert "judged by ImplicitRewardJudge" in capsys.readouterr().out


def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint("last.ckpt")
    checkpoint("reward.ckpt", kind=RewardModule)
    checkpoint("object.ckpt", policy=AutoModelForCausalLM.from_pretrained("model"))
    call = ["compare", "--checkpoint=last.ckpt", *SMALL, "--judge=my_module.judge", "--samples=6"]
    mistakes = {
        "--judge=my_module.nan": "`judge` must give finite scores, got nan from nan",
        "--judge=my_module.nope": "`judge` must be the dotted path of a callable",
        "--judge=./model": "`model` must be a trained sequence classification model",
        "--data=pears.jsonl": "`data` must be an existing file, a folder or a hub id, got 'pears.jsonl'",
        "--checkpoint=first.ckpt": "`checkpoint` must be a file that the trainer saved, got 'first.ckpt'",
        "--checkpoint=model": "`checkpoint` is the folder of a model, which names no reference",
        "--checkpoint=reward.ckpt": "`checkpoint` must be of a policy, got 'reward.ckpt', that of a reward",
        "--checkpoint=object.ckpt": "`reference` must name a model, since the checkpoint's",
        "--samples=0": "`samples` must be at least 1, got 0",
        "--device=gpu": "`device` must be one that torch has here, such as cpu or cuda, or auto, got",
        "--out=c.txt": "`out` must end in .json or .parquet, got 'c.txt'",
    }
    for argument, expected in mistakes.items():
        with pytest.raises(SystemExit):
            main([*call, argument])
        assert f"error: {expected}" in capsys.readouterr().err, argument
    with pytest.raises(SystemExit):
        main([*call, "--checkpoint=object.ckpt", "--reference=model", "--tokenizer=nowhere/at/all"])
    assert "error: " in capsys.readouterr().err
