"""What a user sees of a command that runs in a process, and in a terminal, of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "configs" / "smollm2_dpo.yaml"
FIT = [
    sys.executable,
    "-c",
    "from lightning_dpo.cli import main; main()",
    "fit",
    f"--config={RECIPE}",
    "--model.policy=model",
    "--data.train=pairs.jsonl",
    "--data.num_processes=1",
    "--data.validation_split=0.25",
    "--trainer.accelerator=cpu",
]


def environment(folder: Path) -> dict[str, str]:
    cleared = {key: value for key, value in os.environ.items() if key not in ("PYTHONWARNINGS", "COLUMNS")}
    return {**cleared, "LIGHTNING_DPO_CACHE": str(folder / "cache"), "TERM": "xterm"}


def plain(text: str) -> list[str]:
    """Lines without the terminal's control sequences."""
    return [
        line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)) if line.strip()
    ]


def test_only_what_concerns_the_user_is_shown(folder: Path) -> None:
    (folder / "lightning_logs" / "version_0" / "checkpoints").mkdir(parents=True)
    (folder / "own.py").write_text(
        "import warnings, lightning.pytorch as pl\n"
        "class Own(pl.Callback):\n"
        "    def on_fit_start(self, trainer, pl_module):\n"
        "        warnings.warn('the callback is old', FutureWarning)\n"
    )
    options = ["--data.tokens_per_batch=20", "--data.batch_size=null", "--trainer.callbacks+=own.Own"]
    run = subprocess.run(
        [*FIT, *options], cwd=folder, env=environment(folder), capture_output=True, text=True, check=True
    )
    shown = run.stdout + run.stderr
    assert "pairs are longer than `tokens_per_batch` (20)" in shown
    assert "the callback is old" in shown  # a user's own code
    others = [line for line in plain(shown) if not re.search("tokens_per_batch|the callback is old", line)]
    unwanted = r"warning|deprecated|\btip\b|litlogger|litmodels|srun|not supported"
    assert [line for line in others if re.search(unwanted, line, re.IGNORECASE)] == []


def test_whoever_asks_python_for_warnings_gets_them(folder: Path) -> None:
    asked = {**environment(folder), "PYTHONWARNINGS": "default"}
    limited = [*FIT, "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    run = subprocess.run(limited, cwd=folder, env=asked, capture_output=True, text=True, check=True)
    assert re.search("deprecated", run.stderr)


def test_the_bar_of_a_run_is_one_line_of_80_columns(folder: Path) -> None:
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))
    sampling = ["--trainer.callbacks+=lightning_dpo.evaluation.CompletionMonitor"]
    sampling += ["--trainer.callbacks.num_prompts=2", "--trainer.callbacks.max_new_tokens=3"]
    process = subprocess.Popen(
        [*FIT, *sampling, "--trainer.max_epochs=2"],
        cwd=folder,
        env=environment(folder),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    written = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            break
        if not part:
            break
        written += part
    os.close(main)
    assert process.wait() == 0, written.decode()
    lines = plain(written.decode())
    bars = [line for line in lines if line.startswith(("epoch", "val"))]
    assert bars
    assert max(map(len, bars)) <= 80
    pair, number = r"[\d.]+/[\d.]+", r"-?[\d.]+"
    values = rf"loss {pair} margin {number} acc {pair} KL {number} tok/s {number}k?"
    assert re.fullmatch(rf"epoch 2/2 2/2 (\d\d:\d\d )?{values}", bars[-1].strip()), bars[-1]
