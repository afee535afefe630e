from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_dpo.training.callbacks.freed_memory import keep_freed_memory

ROOT = Path(__file__).resolve().parents[2]
TENSOR = 64 * 2**20

TRAINING = """
import resource, sys
sys.path.insert(0, "tests/support")
import torch
from tiny_models import tiny_model
from training import loader, sgd, trainer
from lightning_dpo import DPOModule

def faults():
    found = []
    for _ in range(20):  # the first ones fill the heap
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones({numbers})
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found)

before = faults()
module = DPOModule(tiny_model(), optimizer=sgd)
trainer(max_steps=1).fit(module, loader())
print("faults", before, faults())
"""
"""Prints pages that a tensor of `TENSOR` bytes has mapped anew, before and after training."""


def pages_mapped_anew() -> list[int]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", TRAINING.format(numbers=TENSOR // 4)],
        cwd=ROOT,
        env={**own, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("faults"))
    return [int(number) for number in line.split()[1:]]


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="a setting of glibc")
def test_what_a_step_frees_is_not_mapped_anew_by_the_next() -> None:
    before, after = pages_mapped_anew()
    assert before > TENSOR // 2**21 * 0.9  # of 2 MiB at the largest
    assert after < before / 10


@pytest.mark.parametrize(
    "name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"]
)
def test_settings_of_the_users_own_win(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert keep_freed_memory() is False
