"""The command `lightning-dpo demo`: the embedded task, as a sweep or as one training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import auto_cli

from lightning_dpo.tuning import require_ray

__all__ = ["demo", "run"]


def demo(*, output: Path = Path("outputs/demo"), beta: float | None = None, seed: int = 0) -> None:
    """Sweep over the embedded task and show samples before and after; needs no download and no GPU.

    Args:
        output: Folder for the task's model, data and results.
        beta: One training run with this pull towards the reference, in the place of the sweep.
        seed: Of the one training run.

    Raises:
        ValueError: If `output` is a file.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output` must be a folder, got {str(output)!r}, which is a file")
    if beta is not None:
        from lightning_dpo.demo.run import run_demo

        run_demo(output=output, beta=beta, seed=seed)
        return
    require_ray()
    from lightning_dpo.demo.sweep import run_demo_sweep

    run_demo_sweep(output=output)


def run(arguments: Sequence[str]) -> None:
    """Run the demonstration.

    Args:
        arguments: What follows `lightning-dpo demo`.
    """
    auto_cli(demo, args=list(arguments), as_positional=False, prog="lightning-dpo demo")
