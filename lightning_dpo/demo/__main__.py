"""``python -m lightning_dpo.demo``: the embedded task from the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the demonstration."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_dpo.demo",
        description="Align a small decoder on reviews with a known score: no download, no GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("outputs/demo"), help="folder for task, model and figures")
    add("--beta", type=float, default=0.4, help="strength of the pull towards the reference")
    add("--lr", type=float, default=0.01, help="highest learning rate")
    add("--epochs", type=int, default=4, help="passes over the training pairs")
    add("--seed", type=int, default=0, help="seeds task, training and samples")
    options = parser.parse_args(arguments)

    from lightning_dpo.demo.run import run_demo

    run_demo(**vars(options))


if __name__ == "__main__":
    main()
