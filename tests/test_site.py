"""The documentation site: what it is made of, its formulas and commands are true, and nothing public is mute."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from imagewright.cli.known import require_known
from imagewright.cli.main import COMMANDS
from imagewright.paths.conversions import PREDICTIONS, convert
from imagewright.paths.gaussian import Linear, TrigFlow, VarianceExploding, VariancePreserving
from imagewright.recipes import RECIPES

ROOT = Path(__file__).parents[1]
DOCS, SOURCE = ROOT / "docs", ROOT / "src" / "imagewright"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the site is made by, and what examples share, can be imported; nothing is left behind."""
    for folder in (DOCS / "site", ROOT / "examples"):
        monkeypatch.syspath_prepend(str(folder))


# --- pages that are made


def test_the_reference_of_commands_has_every_option() -> None:
    import commands

    page = commands.page()
    for name in COMMANDS:
        assert f"\n## {name}\n" in page
    for option in ("--trajectory", "--holdout", "--training.batch", "--method.augment.p", "--no-yardsticks"):
        assert f"`{option}" in page, option
    assert "Args:" not in page and "\x1b" not in page


def test_the_library_has_a_page_for_each_package() -> None:
    import library

    pages = library.pages()
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")} - {*library.LEFT_OUT}
    assert {*pages} == {"api/index.md", "api/imagewright.md", *(f"api/{name}.md" for name in packages)}
    assert "::: imagewright.samplers.restart" in pages["api/samplers.md"]


def test_the_tested_pairs_are_current() -> None:
    """Made anew by: PYTHONPATH=src python docs/site/matrix.py > docs/matrix.md"""
    import matrix

    before = [*sys.path]
    try:
        assert (DOCS / "matrix.md").read_text() == matrix.page()
    finally:
        sys.path[:] = before


def test_every_recipe_stands_in_the_tested_pairs_by_its_method() -> None:
    page = (DOCS / "matrix.md").read_text()
    for name, recipe in RECIPES.items():
        assert f"| {type(recipe().method).__name__} |" in page, name


def test_the_site_asks_no_other_server() -> None:
    """Fonts, the repository's stars and MathJax are what the theme would fetch."""
    told = (ROOT / "mkdocs.yml").read_text()
    assert "\n  font: false\n" in told and "\n  - search\n" in told
    assert not re.search(r"^(repo_url|extra_javascript|extra_css)|analytics|arithmatex|mermaid", told, re.MULTILINE)


# --- no public name without a word


def _bare() -> list[str]:
    """Public modules, classes, functions and methods without a docstring.

    A method is documented where its name is: in a contract or base class, of which it is one more. What a claim's files
    lack in methods is left: their records pin the files' hashes.
    """
    said: set[str] = set()
    missing: list[tuple[str, str]] = []
    for path in sorted(SOURCE.rglob("*.py")):
        tree, where = ast.parse(path.read_text()), path.relative_to(SOURCE).as_posix()
        if ast.get_docstring(tree) is None:
            missing.append((where, ""))
        for node in (n for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))):
            if node.name.startswith("_") or _overload(node):
                continue
            told = ast.get_docstring(node)
            if told is None:
                missing.append((where, node.name))
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if not isinstance(inner, ast.FunctionDef):
                    continue
                if ast.get_docstring(inner) or re.search(rf"(^|  ){inner.name}:", told or "", re.MULTILINE):
                    said.add(inner.name)
                elif not inner.name.startswith("_") and not where.startswith("bench/claims"):
                    missing.append((where, f"{node.name}.{inner.name}"))
    mute = [(where, name) for where, name in missing if "." not in name or name.rpartition(".")[2] not in said]
    return [f"{where} {name}".strip() for where, name in mute]


def _overload(node: ast.ClassDef | ast.FunctionDef) -> bool:
    return any(isinstance(each, ast.Name) and each.id == "overload" for each in node.decorator_list)


def test_every_public_name_has_a_docstring() -> None:
    assert _bare() == []


# --- the glossary


def _numbers(path: Any) -> dict[str, Any]:
    """A point of a path in double precision, every prediction of it, and the path's numbers there, by their names."""
    t = torch.linspace(0.2, 0.9, 5, dtype=torch.float64) * path.t_max
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    x_t = path.mix(x0, eps, t)
    scales = {name: getattr(path, name)(t)[:, None] for name in ("alpha", "sigma", "alpha_prime", "sigma_prime")}
    told = {word: convert(x0, x_t, t, path, "x0", word) for word in PREDICTIONS}
    return {**scales, **told, "x_t": x_t, "t": t[:, None], "s": path.nsr(t)[:, None]}


def _rows(heading: str) -> list[list[str]]:
    """Cells of the table whose first line is given."""
    table = (DOCS / "glossary.md").read_text().split(f"\n{heading}\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]


def _value(formula: str, known: dict[str, Any]) -> Any:
    functions = {name: getattr(torch, name) for name in ("cos", "sin", "exp", "sqrt", "atan")}
    return eval(formula, {"__builtins__": {}}, {**functions, **known})


@pytest.mark.parametrize("path", [Linear(), TrigFlow(), VariancePreserving(), VarianceExploding(sigma_max=3.0)])
def test_the_glossarys_conversions_are_the_programs(path: Any) -> None:
    known = _numbers(path)
    rows = _rows("| from | x0 | eps |")
    assert [row[0] for row in rows] == ["x0", "eps", "score", "v", "velocity"]
    for row in rows:
        for word, formula in zip(("x0", "eps"), row[1:], strict=True):
            torch.testing.assert_close(_value(formula.strip("`"), known), known[word])
    for row in _rows("| word | what it is | source |")[2:]:
        formula = re.findall(r"`([^`]+)`", row[1])[0]
        torch.testing.assert_close(_value(formula, known), known[row[0].strip("*")])


@pytest.mark.parametrize("path", [Linear(), VarianceExploding(), TrigFlow()])
def test_the_glossarys_paths_are_the_programs(path: Any) -> None:
    known = {**_numbers(path), "sigma_data": 0.5}
    rows = _rows("| path | alpha | sigma | time from the library's sigma | who uses it |")
    (row,) = (row for row in rows if row[0] == f"`{type(path).__name__}`")
    for name, formula in zip(("alpha", "sigma", "t"), row[1:4], strict=True):
        value = torch.as_tensor(_value(formula.strip("`"), known), dtype=torch.float64)
        torch.testing.assert_close(value.expand_as(known[name]), known[name])


# --- pages that tell what to type


@pytest.mark.parametrize("page", ["choosing", "examples", "glossary", "playing"])
def test_what_a_page_types_is_known(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text()
    for words in re.findall(r"^    imagewright (.+)$", text, re.MULTILINE):
        require_known(shlex.split(words, comments=True))
    for script in re.findall(r"^    python (\S+)", text, re.MULTILINE):
        assert (ROOT / script).exists(), script
    for family in re.findall(r"`([a-z0-9-]+-)\*`", text):
        assert any(name.startswith(family) for name in RECIPES), family


@pytest.mark.parametrize("name", ["the_plane", "own_data", "distil_downloaded", "add_a_method", "latent_tradeoff"])
def test_an_example_goes_the_whole_way(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--short", "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert list(tmp_path.rglob("*.png"))
    assert "nan" not in capsys.readouterr().out
