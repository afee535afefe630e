"""A parser whose error says which losses have an argument that the chosen one lacks, and what a judge is."""

from __future__ import annotations

import re
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_dpo import losses
from lightning_dpo.losses.base import PreferenceLoss, unknown_argument

__all__ = ["LossAwareParser"]

_REFUSED = re.compile(r"class_path '(?:[\w.]+\.)?(\w+)':\s+Option '(\w+)' is not accepted")

_NO_JUDGE = re.compile(r'Parser key "judge":.*?Expected a dot import path string: (\S+)', re.DOTALL)


class LossAwareParser(LightningArgumentParser):
    """LightningCLI's parser: jsonargparse checks arguments before any class could refuse them itself."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with what was wrong, in the loss's own words where it is an argument of a loss."""
        found = _REFUSED.search(message)
        loss = getattr(losses, found[1], None) if found else None
        if found and isinstance(loss, type) and issubclass(loss, PreferenceLoss):
            message = unknown_argument(found[2], loss=loss)
        judge = _NO_JUDGE.search(message)
        if judge:
            message = (
                "`judge` must be the import path of a callable, such as "
                f"lightning_dpo.demo.grammar.true_score, got {judge[1]!r}; PPOModule takes the folder of a "
                "reward model as `reward_model`"
            )
        super().error(message, ex)
        raise AssertionError("the parser has raised or ended the program")
