from __future__ import annotations

from pathlib import Path

# Lightning's log handler keeps the stderr of the moment it is imported: not that of one test.
import lightning.pytorch  # noqa: F401
import pytest
from pair_rows import COLOURS, jsonl
from tiny_folder import save_tiny


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a command runs: a small model with its tokenizer, and pairs."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    jsonl(tmp_path / "pairs.jsonl", COLOURS)
    return tmp_path
