"""Grid and random search: starting points first, and nothing twice where a sweep goes on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray.tune.search import BasicVariantGenerator

from lightning_dpo.tuning.search.space import SearchSpace

__all__ = ["PlainSearch"]


class PlainSearch(BasicVariantGenerator):
    """Ray's generator of grids and random draws, which passes over trials that have run already.

    The draws come from the seed alone, so a sweep of 16 trials that goes on to 32 runs the same 32 as one
    that ran them at once, and their names go on counting.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        points: Sequence[Mapping[str, Any]] = (),
        done: Iterable[Mapping[str, Any]] = (),
        limit: int | None = None,
        **arguments: Any,
    ) -> None:
        """Say what runs.

        Args:
            space: What varies.
            points: Ray's configs that are run first, each in the place of a draw.
            done: Values by config path of trials that have run.
            limit: Trials at most; None runs all that Tune asks for.
            arguments: For Ray's generator.
        """
        if points:
            arguments["points_to_evaluate"] = [dict(point) for point in points]
        super().__init__(**arguments)
        self._space = space
        self._done = Counter(map(_mark, done))
        self._left = limit

    def next_trial(self) -> Any:
        """The next trial that has not run."""
        while self._left is None or self._left > 0:
            trial = super().next_trial()  # type: ignore[no-untyped-call]
            if trial is None:
                return None
            mark = _mark(self._space.overrides(trial.config))
            if not self._done[mark]:
                self._left = None if self._left is None else self._left - 1
                return trial
            self._done[mark] -= 1
            self._live_trials.discard(trial.trial_id)
        self.set_finished()  # type: ignore[no-untyped-call]
        return None


def _mark(overrides: Mapping[str, Any]) -> str:
    """Values as one text, the same for those of a record that was read from its file."""
    return json.dumps(dict(overrides), sort_keys=True, default=repr)
