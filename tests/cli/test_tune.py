from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from sweep_results import made_up

from lightning_dpo.cli.main import main
from lightning_dpo.tuning.trial.ending import INTERRUPTED


@pytest.mark.parametrize(("reason", "status"), [("", None), (INTERRUPTED, 130)])
def test_a_sweep_that_was_interrupted_ends_as_a_program_that_was(
    reason: str, status: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = made_up(str(tmp_path), trials=4)
    result = replace(result, trials=(*result.trials[:-1], replace(result.trials[-1], reason=reason)))
    monkeypatch.setattr("lightning_dpo.tuning.run.sweep", lambda *_, **__: result)
    (tmp_path / "sweep.yaml").write_text("space: {model.loss.beta: {uniform: [0, 1]}}\n")
    command = ["tune", "--config", str(tmp_path / "sweep.yaml")]
    if status is None:
        main(command)
        return
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == status
