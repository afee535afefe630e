"""Peak memory that `lightning_dpo.parallel.memory` predicts, beside what training on the CPU really takes.

    python -m benchmarks.plan_memory [--sizes 20m 60m 150m] [--gradient_checkpointing [selective]]

Each size trains a few steps in a process of its own: random weights, float32, AdamW, a frozen reference.
Counted is the largest resident set while training, beyond what the same process had after its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.process import resident_mib
from lightning_dpo.types.choices import Recomputation

_SIZES: dict[str, dict[str, int]] = {
    "20m": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "heads": 6,
        "tokens": 1536,
    },
    "60m": {
        "hidden_size": 640,
        "intermediate_size": 1728,
        "num_hidden_layers": 10,
        "heads": 10,
        "tokens": 768,
    },
    "150m": {
        "hidden_size": 1024,
        "intermediate_size": 2752,
        "num_hidden_layers": 10,
        "heads": 16,
        "tokens": 512,
    },
}
SIZES = tuple(_SIZES)
_PAIR = 256
_STEPS = 2
_MIB = 2**20


class Comparison(NamedTuple):
    """One size.

    Attributes:
        parameters: Of the policy.
        tokens: Positions of a step.
        measured: Peak, bytes.
        predicted: Peak, bytes.
    """

    parameters: int
    tokens: int
    measured: int
    predicted: int

    @property
    def error(self) -> float:
        """How much more was predicted than measured, as a share."""
        return self.predicted / self.measured - 1


def configuration(size: str) -> dict[str, Any]:
    """The content of a config.json."""
    shape = dict(_SIZES[size])
    shape.pop("tokens")
    heads = shape.pop("heads")
    return {
        "model_type": "llama",
        **shape,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": 16000,
        "max_position_embeddings": 512,
    }


def compare(size: str, *, gradient_checkpointing: Recomputation = False) -> Comparison:
    """Predict, and measure in a fresh process."""
    from lightning_dpo.parallel.memory import load_config, model_shape, plan_memory

    shape = model_shape(load_config(configuration(size)))
    tokens = _SIZES[size]["tokens"]
    plan = plan_memory(
        shape,
        strategy="ddp",
        tokens=tokens,
        completion_tokens=tokens // 2,
        pair_tokens=_PAIR,
        precision="32-true",
        gradient_checkpointing=gradient_checkpointing,
        accelerator="cpu",
    )
    # Large blocks go back to the system when they are freed, so that the resident set is what is in use.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "262144",
        "MALLOC_TRIM_THRESHOLD_": "262144",
    }
    command = [sys.executable, "-m", "benchmarks.plan_memory", "--run", size]
    if gradient_checkpointing:
        command += ["--gradient_checkpointing", *["selective"] * (gradient_checkpointing == "selective")]
    root = Path(__file__).parents[1]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=root)
    line = next(text for text in child.stdout.splitlines() if text.startswith("PEAK "))
    return Comparison(shape.parameters, tokens, json.loads(line.removeprefix("PEAK ")), plan.peak)


def run(size: str, *, gradient_checkpointing: Recomputation) -> None:
    """Train in this process and print the peak."""
    import lightning.pytorch as pl
    import torch
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    from lightning_dpo import DPOModule, PairBatch
    from lightning_dpo.parallel.memory import load_config
    from lightning_dpo.types import TokenPair

    torch.set_num_threads(1)
    before = resident_mib("VmRSS")

    class ForgetLoading(pl.Callback):
        def on_train_start(self, *_: object) -> None:
            Path("/proc/self/clear_refs").write_text("5")

    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 1000, (length,), generator=generator).tolist()

    pairs = _SIZES[size]["tokens"] // _PAIR
    batch = PairBatch.from_pairs(
        [TokenPair(ids(_PAIR // 2), ids(_PAIR // 4), ids(_PAIR // 4)) for _ in range(pairs)]
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[ForgetLoading()],
        max_steps=_STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = AutoModelForCausalLM.from_config(load_config(configuration(size)))
    module = DPOModule(model, gradient_checkpointing=gradient_checkpointing)
    trainer.fit(module, DataLoader([batch] * _STEPS, batch_size=None))
    print(f"PEAK {round((resident_mib('VmHWM') - before) * _MIB)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument(
        "--gradient_checkpointing", nargs="?", const=True, default=False, choices=["selective"]
    )
    parser.add_argument("--run")
    options = parser.parse_args()
    if options.run:
        run(options.run, gradient_checkpointing=options.gradient_checkpointing)
        return
    print("parameters   tokens   measured MiB   predicted MiB   difference")
    for size in options.sizes:
        row = compare(size, gradient_checkpointing=options.gradient_checkpointing)
        print(
            f"{row.parameters / 1e6:9.1f}M {row.tokens:8d} {row.measured / _MIB:14.0f} "
            f"{row.predicted / _MIB:15.0f} {row.error:+12.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
