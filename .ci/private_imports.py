"""Find what one package of flexnorm takes from the private parts of another: modules and names that start with ``_``.

import-linter knows modules, not names; this reads the imports, and the attributes of imported modules, off the syntax.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

SHARED = {"_messages", "_version"}  # of no package in particular: their names are for all


def owner(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The package that a module belongs to: ``("flexnorm", "nn")``, ``("flexnorm", "lab", "run")``."""
    return parts[: 3 if parts[1:2] == ("lab",) else 2]


def private(names: list[str]) -> list[str]:
    """Those that are private, and neither shared nor magic."""
    return [name for name in names if name.startswith("_") and name not in SHARED and not name.startswith("__")]


def violations(path: Path, root: Path) -> Iterator[str]:
    """Lines that say where a file reaches into another package."""
    parts = path.relative_to(root.parent).with_suffix("").parts
    own = owner(parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == root.name:
            source = tuple(node.module.split("."))
            if owner(source) == own:
                continue
            names = [alias.name for alias in node.names]
            for name in private([*source, *names]):
                yield f"{path}:{node.lineno}: {name} of {node.module} is private"
            modules.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
        elif isinstance(node, ast.Import):
            for alias in node.names:
                source = tuple(alias.name.split("."))
                if source[0] == root.name and owner(source) != own:
                    for name in private([*source]):
                        yield f"{path}:{node.lineno}: {name} of {alias.name} is private"
                    if alias.asname:
                        modules[alias.asname] = alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            for name in private([node.attr]):
                yield f"{path}:{node.lineno}: {name} of {modules[node.value.id]} is private"


def main(root: Path) -> int:
    """Print every violation below a package; return how many there are."""
    found = [line for path in sorted(root.rglob("*.py")) for line in violations(path, root)]
    print("\n".join(found) if found else f"{root.name}: no package reaches into the private parts of another")
    return len(found)


if __name__ == "__main__":
    sys.exit(min(main(Path(sys.argv[1]).resolve()), 1))
