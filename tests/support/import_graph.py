"""Which module of the package imports which, read from the source; imports within functions count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

PACKAGE = "lightning_dpo"


def import_graph(root: Path) -> nx.DiGraph:
    """A graph of the modules below a folder that holds the package, an edge for each import.

    Importing a module also runs its packages' own files; those count where they are imported by name.
    """
    files = {_module(path, root): path for path in (root / PACKAGE).rglob("*.py")}
    graph = nx.DiGraph()
    graph.add_nodes_from(files)
    for module, path in files.items():
        for name in _imported(path):
            target = _resolve(name, files)
            if target is not None and target != module:
                graph.add_edge(module, target)
    return graph


def circles(graph: nx.DiGraph) -> list[list[str]]:
    """Groups of modules that import each other, directly or by way of others."""
    return sorted(sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1)


def room_of(module: str) -> str:
    """The folder, or the file, at the package's top that a module belongs to; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def _module(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports; for `from a import b` both, since b may be a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _resolve(name: str, files: dict[str, Path]) -> str | None:
    """The module that a dotted name lies in."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name or None
