"""A parser whose error is one message: what an option is called, which losses there are, what a judge is."""

from __future__ import annotations

import difflib
import re
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_dpo import losses
from lightning_dpo.losses.base import PreferenceLoss, unknown_argument
from lightning_dpo.losses.unpaired import UnpairedLoss

__all__ = ["LossAwareParser"]

_REFUSED = re.compile(r"class_path '(?:[\w.]+\.)?(\w+)':\s+Option '(\w+)' is not accepted")

_NO_JUDGE = re.compile(r'Parser key "judge":.*?Expected a dot import path string: (\S+)', re.DOTALL)


_NO_LOSS = re.compile(r'Parser key "(?:model\.)?loss":.*?Expected a dot import path string: (\S+)', re.DOTALL)

_OURS = re.compile(r"^\s+(`loss` must be .+)$", re.MULTILINE)
"""What this parser said of the arguments of a class, within the error of the whole."""

_UNKNOWN = re.compile(r"[Uu]nrecognized arguments: --([\w.-]+)")


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
        no_loss = _NO_LOSS.search(message)
        if no_loss:
            message = _unknown_loss(no_loss[1], judged="unpaired.UnpairedLoss" in message)
        ours = _OURS.search(message)
        if ours:
            message = ours[1]
        unknown = _UNKNOWN.match(message)
        if unknown:
            message += self._meant(unknown[1])
        super().error(message, ex)
        raise AssertionError("the parser has raised or ended the program")

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: a hundred lines of options would stand before the error."""

    def _meant(self, option: str) -> str:
        """Which options end in the same word as one that there is not, or look like it."""
        names = self.get_defaults().keys()  # a namespace, which is not iterable itself
        known = dict.fromkeys(name.replace("init_args.", "") for name in names)
        wanted = option.replace("-", "_")
        word = wanted.rpartition(".")[2]
        near = [name for name in known if name.rpartition(".")[2] == word]
        near = near or difflib.get_close_matches(wanted, known, n=2, cutoff=0.8)
        return f"; did you mean {' or '.join(f'--{name}' for name in near)}?" if near else ""


def _unknown_loss(name: str, *, judged: bool) -> str:
    """What to tell the user who named a loss that there is not, or one of the other kind of data."""
    bases = {True: UnpairedLoss, False: PreferenceLoss}
    classes = [getattr(losses, each) for each in losses.__all__]
    fitting = [one.__name__ for one in classes if issubclass(one, bases[judged]) and one is not bases[judged]]
    kinds = ("judged completions", "KTOModule, as in configs/kto.yaml"), ("pairs", "DPOModule")
    (kind, _), (other, module) = kinds if judged else kinds[::-1]
    is_other = any(one.__name__ == name and issubclass(one, bases[not judged]) for one in classes)
    found = f"which is one of {other}: train it with {module}" if is_other else "which is none"
    return f"`loss` must be a loss of {kind}, got {name!r}, {found}; there are {', '.join(fitting)}"
