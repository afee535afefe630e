"""What a start on pairs whose reference log-probabilities are all cached takes, before the first step.

    python -m benchmarks.cached_start                 # 200,000 synthetic pairs of short rows, two starts
    python -m benchmarks.cached_start --pairs 1000000

Each start is a process of its own, with a model of a few thousand weights: what is timed is looking up what
the cache has of the data, which is all. The first one finds tokens without keys beside them, as an older
version left them, and a cache without an index; the second finds both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VOCAB = 97


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        start(arguments.run)
        return
    print("| pairs | start | seconds, wall | seconds, CPU | passes |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), arguments.pairs)
        environment = {**os.environ, "LIGHTNING_DPO_CACHE": name, "HF_HUB_OFFLINE": "1"}
        for number in range(arguments.starts):
            command = [sys.executable, "-m", "benchmarks.cached_start", "--run", name]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-4000:])
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {arguments.pairs:,} | {number + 1} | {found['wall']:.1f} | {found['cpu']:.1f} | "
                f"{found['passes']} |",
                flush=True,
            )


def write(folder: Path, pairs: int) -> None:
    """A model, tokens, and a cache that has every pair."""
    import numpy as np
    from transformers import LlamaConfig, LlamaForCausalLM

    from lightning_dpo.data.token_store import arrow_batch, new_entry
    from lightning_dpo.models.identity import source_identity
    from lightning_dpo.reference.cache.keys import completion_key
    from lightning_dpo.reference.cache.shards import Entries, encode
    from lightning_dpo.reference.cache.store import Space
    from lightning_dpo.types import TokenPair

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    weights = source_identity(str(folder / "model"), trust_remote_code=False)
    space = Space(weights, "torch.float32 as torch.float32", "None highest", "default").key
    cache = folder / "reference" / space
    cache.mkdir(parents=True)
    random = np.random.default_rng(0)
    with new_entry(folder / "pairs" / "tokens") as entry:
        for first in range(0, pairs, 2**16):
            count = min(2**16, pairs - first)
            parts = [random.integers(0, VOCAB, (count, size)) for size in (12, 10, 8)]
            rows = [TokenPair(*row) for row in zip(*parts, strict=True)]
            entry.write(arrow_batch(rows, rows=range(first, first + count)))
            named = [completion_key(p, c) for p, a, b in rows for c in (a, b, a[:8])]
            entries = Entries(
                np.array(named),
                random.normal(size=len(named)).astype(np.float32),
                np.tile(np.array([10, 8, 8], dtype=np.int32), count),
            )
            name, data = encode(entries, space=space)
            (cache / name).write_bytes(data)
        from lightning_dpo.data.bad_rows import RowReport

        entry.finish(RowReport("synthetic", "text", rows=pairs, kept=pairs))


def start(folder: Path) -> None:
    import lightning.pytorch as pl

    from lightning_dpo import DPOModule, PreferenceDataModule
    from lightning_dpo.data.token_store import TokenStore
    from lightning_dpo.reference import fill

    class Synthetic(PreferenceDataModule):
        def _prepare(self) -> None:
            self._stores = {"train": TokenStore(folder / "pairs" / "tokens")}

    taken: dict[str, Any] = {}
    lookup = fill.fill_cache

    def timed(*arguments: Any, **options: Any) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        lookup(*arguments, **options)
        taken.update(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)

    fill.fill_cache = timed
    module = DPOModule(str(folder / "model"), reference="cached", startup_check=False)
    trainer = pl.Trainer(
        max_epochs=1, max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    # A whole epoch is looked up, as where a run takes it; one step of it is made.
    fill_loaders = fill.trainer_completions

    def whole(trainer: pl.Trainer, **options: Any) -> Any:
        trainer.fit_loop.epoch_loop.max_steps = -1
        yield from fill_loaders(trainer, **options)
        trainer.fit_loop.epoch_loop.max_steps = 1

    fill.trainer_completions = whole
    trainer.fit(module, Synthetic("unused", tokens_per_batch=16384))
    usage = next(c.usage for c in trainer.callbacks if isinstance(c, fill.FillReferenceCache))  # type: ignore[attr-defined]
    assert usage is not None
    print(json.dumps({**taken, "passes": usage.passes}))


if __name__ == "__main__":
    main()
