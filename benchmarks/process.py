"""A variant of a benchmark in a process of its own, and what a process takes of the memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["resident_mib", "run_child"]

ROOT = Path(__file__).resolve().parents[1]


def run_child(module: str, variant: str, settings: NamedTuple, *, threads: int) -> dict[str, Any]:
    """Run ``python -m MODULE VARIANT SETTINGS.json RESULT.json``; returns what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        settings_file, result = Path(folder, "settings.json"), Path(folder, "result.json")
        settings_file.write_text(json.dumps(settings._asdict()))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "RAY_memory_monitor_refresh_ms": "0",
        }
        done = subprocess.run(
            [sys.executable, "-m", module, variant, settings_file, result],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{variant} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def resident_mib(field: str) -> float:
    """A line of this process's status, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
