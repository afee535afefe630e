from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_dpo.tuning.cluster.retry import fit_with_retries, was_interrupted


class Tuner:
    def __init__(self, *trials: tuple[str, bool]) -> None:
        found = [SimpleNamespace(status=s, should_recover=lambda r=r: r) for s, r in trials]
        self.outcome: Any = SimpleNamespace(_experiment_analysis=SimpleNamespace(trials=found))

    def fit(self) -> Any:
        return self.outcome


@pytest.mark.parametrize(
    ("rounds", "used"),
    [
        ([Tuner(("TERMINATED", True))], 1),
        ([Tuner(("ERROR", False), ("TERMINATED", True))], 1),  # it has had its retries
        ([Tuner(("ERROR", True)), Tuner(("TERMINATED", True))], 2),
        ([Tuner(("ERROR", True)), Tuner(("ERROR", True)), Tuner(("ERROR", False))], 3),
        ([Tuner(("ERROR", True))] * 9, 4),
    ],
)
def test_trials_with_retries_left_are_taken_up_again(rounds: list[Any], used: int) -> None:
    restored = iter(rounds[1:])
    count = 1

    def restore() -> Any:
        nonlocal count
        count += 1
        return next(restored)

    outcome = fit_with_retries(rounds[0], restore)
    assert count == used
    assert outcome is rounds[used - 1].outcome


@pytest.mark.parametrize("comes", [True, False])
def test_a_signal_is_told_and_the_next_one_is_not_swallowed(comes: bool) -> None:
    before = signal.getsignal(signal.SIGINT)

    class Interrupted(Tuner):
        def fit(self) -> Any:
            """What Tune does: its handler stays unless the signal comes, which puts the earlier one back."""
            signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, before))
            if comes:
                signal.raise_signal(signal.SIGINT)
            return self.outcome

    tuner: Any = Interrupted(("TERMINATED", True))
    outcome = fit_with_retries(tuner, lambda: tuner)
    assert was_interrupted(outcome) is comes
    assert signal.getsignal(signal.SIGINT) is before
