"""The command `lightning-dpo frontier`: methods beside each other, reward against KL."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dpo.cli.tune import print_help, split_arguments, wants_help
from lightning_dpo.tuning import require_ray

__all__ = ["run"]

_DESCRIPTION = """Compare methods: reward against KL, each over its strengths and some seeds,
with the best reachable reward.

  lightning-dpo frontier --config tuning/frontier.yaml
  lightning-dpo frontier --config tuning/frontier.yaml --resume
  lightning-dpo frontier --config tuning/frontier.yaml --only DPO --name quick

Any option of `lightning-dpo fit` that begins with --model, --data. or --trainer
holds for all methods.
"""


def run(arguments: Sequence[str]) -> None:
    """Compare methods.

    Args:
        arguments: What follows `lightning-dpo frontier`.

    Raises:
        ValueError: If ray is not installed, or the configuration is not valid.
    """
    require_ray()
    from lightning_dpo.tuning.frontier.config import FrontierConfig, frontier_parser
    from lightning_dpo.tuning.frontier.run import run_frontier

    if wants_help(arguments):
        print_help(frontier_parser, command="frontier", description=_DESCRIPTION)
        return
    file, resume, others = split_arguments(arguments, command="frontier")
    run_frontier(FrontierConfig.from_yaml(file, arguments=others), resume=resume)
