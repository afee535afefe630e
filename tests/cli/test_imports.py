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
found = []
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code, end.code
    imported = {name.partition(".")[0] for name in sys.modules}
    found.append(sorted(imported & set(json.loads(sys.argv[2]))))
print()
print(json.dumps(found))
"""


def imported(*commands: list[str]) -> list[set[str]]:
    """Those of `LARGE` that are imported when each of some commands is done, in one process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands), json.dumps(LARGE)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [set(names) for names in json.loads(done.stdout.splitlines()[-1])]


def test_these_need_no_large_package() -> None:
    light = [["--help"], ["--version"], ["export", "--help"], ["report", "--help"], ["demo", "--help"]]
    assert imported(*light) == [set()] * len(light)


@pytest.mark.slow
def test_training_needs_no_package_of_sweeps_adapters_or_the_hub() -> None:
    for found in imported(*([command, "--help"] for command in ("fit", "validate", "precompute"))):
        assert {"torch", "lightning"} <= found
        assert not found & {"datasets", "gguf", "optuna", "peft", "plotly", "ray", "trl"}
