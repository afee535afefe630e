"""Tests that are run by a test."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from processes import process_context

__all__ = ["run_tests"]


def run_tests(folder: Path, *options: str) -> str:
    """Run a folder's tests as `pytest` in a process of its own; returns what it says."""
    output = folder / "output.txt"
    arguments = ["-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", *options, str(folder)]
    process = process_context().Process(target=_run, args=(folder, output, arguments))
    process.start()
    process.join(120)
    said = output.read_text()
    assert process.exitcode == 0, said
    return said


def _run(folder: Path, output: Path, arguments: list[str]) -> None:
    os.chdir(folder)
    with output.open("w") as file:
        sys.stdout = sys.stderr = file
        status = pytest.main(arguments)
    os._exit(status)
