from __future__ import annotations

import pytest

from lightning_dpo.tuning.trial.ending import outcome_of_dead_process


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        ("ray.exceptions.OutOfMemoryError: Task was killed", "out of memory", "Ray ended the process"),
        ("Traceback\n  line 1\nKeyError: 'a mistake'\n\n", "failed", "KeyError: 'a mistake'"),
        ("", "failed", "unknown"),
    ],
)
def test_why_a_process_died(error: str, status: str, words: str) -> None:
    outcome = outcome_of_dead_process(error)
    assert outcome.status == status
    assert words in outcome.reason
