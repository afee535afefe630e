"""Tests that a run has no time for are skipped, and another commit begins elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from nested_tests import run_tests

CONFTEST = Path(__file__).parent / "conftest.py"


@pytest.mark.slow
def test_what_is_left_is_skipped_and_said_to_be(tmp_path: Path) -> None:
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "test_one.py").write_text("def test_first() -> None: ...\n")
    assert "1 passed" in run_tests(tmp_path, "--minutes=60")
    said = run_tests(tmp_path, "--minutes=0")
    assert "1 skipped" in said
    assert "0 minutes are over; `make test-heavy` runs it" in said
