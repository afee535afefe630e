from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from sweep_project import settings

from lightning_dpo.tuning.results.folder import load_result
from lightning_dpo.tuning.storage import Storage

TESTS = Path(__file__).parents[1] / "support"


def _start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from lightning_dpo.cli.main import main; main()"]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parents[1]}{os.pathsep}{TESTS}"}
    log = (folder / f"log{len(arguments)}").open("w")
    return subprocess.Popen(
        [*command, "tune", f"--config={folder / 'killed.yaml'}", *arguments],
        env=environment,
        stdout=log,
        stderr=log,
        text=True,
    )


def _records(folder: Path) -> dict[str, dict]:
    found = {}
    for path in (folder / "sweeps/killed/trials").glob("*.json"):
        record = json.loads(path.read_text())
        found[record["id"]] = record
    return found


@pytest.mark.heavy
def test_a_killed_driver_goes_on_and_runs_no_finished_trial_again(project: Path, tmp_path: Path) -> None:
    slow = {"class_path": "sweep_faults.Slow", "init_args": {"seconds": 0.5}}
    config = {
        "space": {"model.optimizer.lr": {"grid": [1e-4, 1e-3, 1e-2]}},
        "samples": 1,
        "search": "grid",
        "concurrency": 1,
        "export": False,
        **settings(project, overrides={"trainer.callbacks": [slow]}),
        "storage": str(tmp_path / "sweeps"),
    }
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(config))
    driver = _start(tmp_path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        records = _records(tmp_path).values()
        if any(r["status"] == "finished" for r in records) and any(
            r["status"] == "running" and r["history"] for r in records
        ):
            break
        assert driver.poll() is None, (tmp_path / "log0").read_text()[-3000:]
        time.sleep(0.1)
    children = psutil.Process(driver.pid).children(recursive=True)
    of_trials = [process for process in children if "ImplicitFunc" in process.name()]
    assert of_trials
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(of_trials, timeout=60)
    assert not alive
    before = _records(tmp_path)
    finished = {name for name, record in before.items() if record["status"] == "finished"}
    assert len(finished) == 1
    (running,) = set(before) - finished

    second = _start(tmp_path, "--resume")
    assert second.wait(timeout=170) == 0, (tmp_path / "log1").read_text()[-3000:]
    result = load_result(str(tmp_path / "sweeps/killed"))
    assert {trial.status for trial in result.trials} == {"finished"}
    starts = {trial.id: trial.starts for trial in result.trials}
    assert len(starts) == 3
    assert all(starts[name] == 1 for name in finished)
    assert starts[running] == 2
    for trial in result.trials:
        assert [entry["step"] for entry in trial.history] == [2, 4, 6]
    assert "reference passes: 1" in (tmp_path / "log1").read_text()


def test_a_sweep_that_runs_is_not_resumed_beside_itself(tmp_path: Path) -> None:
    folder = Storage(tmp_path / "sweep")
    with folder.claimed():
        assert folder.is_empty()
        again = Storage(tmp_path / "sweep").claimed()
        with pytest.raises(ValueError, match=r"`name` .* got .*/sweep, which another process works on"):
            again.__enter__()
    with folder.claimed():
        pass
