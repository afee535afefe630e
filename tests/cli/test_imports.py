"""Which large packages a command imports, counted and not timed: what it does not need costs it nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LARGE = (
    "datasets",
    "gguf",
    "lightning",
    "optuna",
    "pandas",
    "peft",
    "plotly",
    "pyarrow",
    "ray",
    "scipy",
    "sklearn",
    "torch",
    "transformers",
    "trl",
)
SCRIPT = """
import json, sys
from lightning_dpo.cli.main import main
try:
    main(json.loads(sys.argv[1]))
except SystemExit as end:
    assert not end.code, end.code
print()
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules} & set(json.loads(sys.argv[2])))))
"""


def imported(*arguments: str) -> set[str]:
    """Those of `LARGE` that a command has imported when it is done, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(arguments), json.dumps(LARGE)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return set(found)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["export", "--help"], ["report", "--help"], ["demo", "--help"]]
)
def test_these_need_no_large_package(arguments: list[str]) -> None:
    assert imported(*arguments) == set()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "validate", "precompute"])
def test_training_needs_no_package_of_sweeps_adapters_or_the_hub(command: str) -> None:
    found = imported(command, "--help")
    assert {"torch", "lightning"} <= found
    assert not found & {"datasets", "gguf", "optuna", "peft", "plotly", "ray", "trl"}
