"""Where the time of a start goes, from the command to the end of the first optimizer step.

    python -m benchmarks.start_times --config configs/smollm2_dpo.yaml --data.train pairs.jsonl
    python -m benchmarks.start_times --starts 3 --config configs/smollm2_dpo.yaml --data.train pairs.jsonl

Arguments are those of `lightning-dpo fit`; each start is a process of its own that makes one step and writes
no checkpoint. The first one tokenises, those after it find the tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_WITHOUT = ("--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.max_steps=1")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(float(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--starts", type=int, default=2)
    arguments, others = parser.parse_known_args()
    columns: list[dict[str, float]] = []
    for _ in range(arguments.starts):
        command = [sys.executable, "-m", "benchmarks.start_times", "--child", str(time.time()), *others]
        done = subprocess.run(
            command, cwd=Path.cwd(), env=_environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr[-4000:])
        columns.append(json.loads(done.stdout.splitlines()[-1]))
    print("| seconds | " + " | ".join(f"start {number}" for number in range(1, len(columns) + 1)) + " |")
    print("|---|" + "---|" * len(columns))
    for phase in columns[0]:
        print(f"| {phase} | " + " | ".join(f"{column[phase]:.2f}" for column in columns) + " |")


def _environment() -> dict[str, str]:
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def child(began: float, arguments: list[str]) -> None:
    """One start; a phase within another is taken out of it."""
    taken: dict[str, float] = {}
    inner: list[float] = []

    def timed(owner: Any, name: str, phase: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def call(*given: Any, **options: Any) -> Any:
            start = time.time()
            inner.append(0.0)
            try:
                return function(*given, **options)
            finally:
                whole = time.time() - start
                taken[phase] = taken.get(phase, 0.0) + whole - inner.pop()
                if inner:
                    inner[-1] += whole

        setattr(owner, name, call)

    taken["the interpreter"] = time.time() - began
    start = time.time()
    from lightning_dpo.training import base, dpo, referenced
    from lightning_dpo.training.cli import DPOCLI

    taken["imports"] = time.time() - start
    from lightning.pytorch import Trainer

    from lightning_dpo.data.datamodule import TokenDataModule
    from lightning_dpo.reference import fill

    timed(DPOCLI, "parse_arguments", "arguments and recipe")
    timed(DPOCLI, "instantiate_classes", "trainer, module and data module")
    timed(TokenDataModule, "_prepare", "tokenised rows: made or found")
    timed(TokenDataModule, "train_dataloader", "batches laid out")
    timed(referenced.ReferencedModule, "on_policy_built", "reference")
    timed(base, "build_trained", "policy")
    timed(base, "select_plan", "how it is scored: tried out")
    timed(fill, "fill_cache", "reference cache: looked up or filled")
    timed(dpo.DPOModule, "training_step", "first step, forward")
    Trainer.save_checkpoint = lambda *_, **__: None  # type: ignore[method-assign]
    DPOCLI(args=["fit", *arguments, *_WITHOUT])
    taken["all else: Lightning, backward, optimizer"] = time.time() - began - sum(taken.values())
    taken["in all"] = time.time() - began
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
