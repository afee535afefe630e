"""Files and folders appear whole or not at all, also where a process dies or another one writes the same."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lightning_dpo import files


def make(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "part").write_text(content)
    return folder


def test_a_file_is_replaced_or_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file.json"
    files.write_file(path, "one", flush=True)
    assert path.read_text() == "one"

    def refuse(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(OSError, match="No space left"):
            files.write_file(path, b"two")
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()  # an empty folder may stand there
    with files.scratch_folder(target) as scratch:
        (scratch / "part").write_text("x")
        assert list(target.iterdir()) == []
    assert [path.name for path in target.iterdir()] == ["part"]
    assert list(tmp_path.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o777 & ~os.umask(os.umask(0o022)) | 0o700


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.scratch_folder(tmp_path / "target") as scratch:  # noqa: PT012
        (scratch / "part").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_of_two_writers_the_first_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(OSError, match="not empty"), files.scratch_folder(target) as scratch:  # noqa: PT012
        (scratch / "part").write_text("second")
        make(target, "first")
    assert (target / "part").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_takes_the_place_of_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if not at_once:
        monkeypatch.setattr(sys, "platform", "another")
    target = make(tmp_path / "last.ckpt", "older")
    files.put_in_place(make(tmp_path / "scratch", "newer"), target)
    assert (target / "part").read_text() == "newer"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux changes two names at once")
def test_no_moment_is_without_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make(tmp_path / "last.ckpt", "older")
    renamed: list[Path] = []
    monkeypatch.setattr(Path, "rename", lambda path, other: renamed.append(path))
    files.put_in_place(make(tmp_path / "scratch", "newer"), target)
    assert renamed == []
    assert (target / "part").read_text() == "newer"


def test_what_a_dying_process_put_aside_is_put_back(tmp_path: Path) -> None:
    for aside in (files.previous_name(tmp_path / "last.ckpt"), tmp_path / ".older.ckpt.previous"):
        make(aside, "older")
    done = make(tmp_path / "done", "newer")
    make(files.previous_name(done), "older")
    files.put_back(tmp_path)
    assert {path.name: (path / "part").read_text() for path in tmp_path.iterdir()} == {
        "last.ckpt": "older",
        "older.ckpt": "older",
        "done": "newer",
    }


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path))
    assert files.cache_folder() == tmp_path
    monkeypatch.delenv("LIGHTNING_DPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "lightning_dpo"
