"""The reference of the library: a page for each package, of its modules' docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "src" / "imagewright"
LEFT_OUT = ("cli", "bench", "report")
"""What is used through commands, whose page is `commands.md`."""


def pages() -> dict[str, str]:
    """Every page of the reference by its name."""
    found = {"": sorted(path for path in ROOT.glob("*.py") if path.stem != "__main__")}
    found |= {
        folder.name: sorted(folder.glob("*.py"))
        for folder in sorted(ROOT.iterdir())
        if (folder / "__init__.py").exists() and folder.name not in LEFT_OUT
    }
    made = {f"api/{name or 'imagewright'}.md": _page(name, modules) for name, modules in found.items()}
    lines = [f"| [imagewright{'.' * bool(n)}{n}]({n or 'imagewright'}.md) | {_first(m)} |" for n, m in found.items()]
    head = "# The library\n\nEvery public name with what its docstring says. A test holds that each has one.\n"
    return {"api/index.md": "\n".join([head, "| package | |", "|---|---|", *lines, ""]), **made}


def _page(package: str, modules: list[Path]) -> str:
    title = ".".join(("imagewright", package)).removesuffix(".")
    return "\n".join([f"# {title}\n", *(f"::: {name}\n" for name in _names(modules))])


def _names(modules: list[Path]) -> Iterator[str]:
    for path in modules:
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(("imagewright", *parts)).removesuffix(".__init__")


def _first(modules: list[Path]) -> str:
    (head,) = (path for path in modules if path.stem == "__init__")
    return (ast.get_docstring(ast.parse(head.read_text())) or "").split("\n\n")[0].replace("\n", " ")
