"""The order of the package's rooms: each imports what stands above it, and no import goes in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytest.importorskip("networkx")

from import_graph import circles, import_graph, room_of

ROOT = Path(__file__).parents[1]
ORDER = (
    "types",
    "files",
    "functional",
    "losses",
    "models",
    "scoring",
    "data",
    "reference",
    "parallel",
    "evaluation",
    "training",
    "reference_sync",
    "tuning",
    "demo",
    "cli",
)
GRAPH = import_graph(ROOT)


def test_no_import_goes_in_a_circle() -> None:
    assert circles(GRAPH) == []


def test_rooms_import_only_what_stands_above_them() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, target in GRAPH.edges
        if room_of(module) and room_of(target) and _place(module) < _place(target)
    ]
    assert wrong == []


def test_only_tuning_imports_ray() -> None:
    found = {
        file.relative_to(ROOT / "lightning_dpo").parts[0]
        for file in (ROOT / "lightning_dpo").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for name in _imported(node)
        if name.partition(".")[0] == "ray"
    }
    assert found == {"tuning"}


def test_every_room_has_a_place() -> None:
    assert {room_of(module) for module in GRAPH.nodes} - {""} == set(ORDER)


def test_the_graph_sees_imports_within_functions(tmp_path: Path) -> None:
    package = tmp_path / "lightning_dpo"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("def f():\n    from lightning_dpo.two import g\n")
    (package / "two.py").write_text("from lightning_dpo import one\n")
    assert circles(import_graph(tmp_path)) == [["lightning_dpo.one", "lightning_dpo.two"]]


def test_files_and_folders_stay_small() -> None:
    # At the top stand thirteen rooms, `files.py`, and the import path of ReferenceSync that recipes name.
    top = ROOT / "lightning_dpo"
    for folder in [top, *(path for path in top.rglob("*") if path.is_dir())]:
        entries = [p for p in folder.iterdir() if p.suffix == ".py" or (p.is_dir() and p.name[0] != "_")]
        assert len([p for p in entries if p.name != "__init__.py"]) <= (15 if folder == top else 14), folder
    for file in (ROOT / "lightning_dpo").rglob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file


def _imported(node: ast.AST) -> list[str]:
    """The modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def _place(module: str) -> int:
    return ORDER.index(room_of(module))
