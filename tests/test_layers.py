"""The order of `docs/architecture.md`, read from the source: imports point down, only the command line prints."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import imagewright

ROOT = Path(imagewright.__file__).parent
LAYERS = (
    ("errors", "leaving"),
    ("types", "version"),
    (
        "limits",
        "shapes",
        "kernels",
        "fused",
        "gathering",
        "moving",
        "noise",
        "files",
        "locks",
        "arrays",
        "pickles",
        "checks",
        "precision",
        "cache",
        "recording",
    ),
    ("paths", "networks", "data", "oracles"),
    ("models",),
    ("samplers", "guidance", "metrics"),
    ("methods",),
    ("training", "interop", "pretrained", "tuning"),
    ("recipes", "bench", "report"),
    ("cli",),
)
"""Lowest first; members of one layer may know each other as long as no circle arises."""
HEAD = "imagewright"
"""The package's own `__init__`, which gathers public names from everywhere: nobody below may import from it."""
LEVEL = {unit: level for level, units in enumerate((*LAYERS, (HEAD,))) for unit in units}
FILES = sorted(ROOT.rglob("*.py"))


def unit_of(path: Path) -> str:
    """Folder or module of the package that a file belongs to: models/files.py -> models."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree(path)))


@cache
def imported(path: Path) -> set[str]:
    """Units that a file imports, at its head or inside functions."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import, which this test does not follow"
            module = node.module or ""
            # `from imagewright import noise` names the unit after the word import.
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "imagewright" else {module}
    ours = [name.split(".")[1:] for name in names if name.split(".")[0] == "imagewright"]
    return {rest[0] if rest and rest[0] in LEVEL else HEAD for rest in ours}


def edges() -> set[tuple[str, str]]:
    """(from, to) between different units of the package below its head."""
    found = set()
    for path in FILES:
        here = unit_of(path)
        if here not in ("__init__", "__main__"):
            found |= {(here, there) for there in imported(path) if there != here}
    return found


def test_every_folder_has_a_layer() -> None:
    units = {unit_of(p) for p in FILES} - {"__init__", "__main__"}
    assert units <= LEVEL.keys()
    assert len(edges()) > 20  # the reading of imports finds something


def test_imports_point_downwards() -> None:
    upwards = [f"{here} imports {there}" for here, there in sorted(edges()) if LEVEL[there] > LEVEL[here]]
    assert not upwards


def test_no_circles() -> None:
    graph: dict[str, set[str]] = {}
    for here, there in edges():
        graph.setdefault(here, set()).add(there)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


def test_networks_know_only_the_types_their_dropout_s_source_number_formats_and_kernels() -> None:
    known = {there for here, there in edges() if here == "networks"}
    assert known == {"types", "noise", "precision", "fused"}


def is_script(path: Path) -> bool:
    """Whether the file ends in `if __name__ == "__main__"`: a builder that is its own command line."""
    return any(isinstance(n, ast.If) and "__name__" in ast.unparse(n.test) for n in tree(path).body)


def printing_functions(path: Path) -> set[str]:
    """Top-level definitions ("" for the module itself) in which `print` is named or a standard stream written to."""
    found = set()
    for top in tree(path).body:
        name = top.name if isinstance(top, (ast.FunctionDef, ast.ClassDef)) else ""
        for node in ast.walk(top):
            if isinstance(node, ast.Name) and node.id == "print":
                found.add(name)
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout.write", "sys.stderr.write"):
                found.add(name)
    return found


def test_only_the_command_line_prints() -> None:
    assert printing_functions(ROOT / "cli" / "console.py")
    told = [
        f"{path.relative_to(ROOT)}: {where or 'module'}"
        for path in FILES
        if unit_of(path) not in ("cli", "__main__")
        for where in printing_functions(path)
        if not (is_script(path) and where == "main")
    ]
    assert not told


RUNS_CODE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNPICKLES = {"torch.load", "torch.hub.load", "torch.jit.load", "pd.read_pickle"}


def unsafe(module: ast.Module) -> list[str]:
    """Ways to execute a pickle; `pickletools` only lists opcodes and is fine."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in RUNS_CODE]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            found += [origin] if origin.split(".")[0] in RUNS_CODE else []
            found += [f"{origin}.{a.name}" for a in node.names if f"{origin}.{a.name}" in UNPICKLES]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in UNPICKLES:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            allow = [k.value for k in node.keywords if k.arg in ("allow_pickle", "weights_only")]
            found += [ast.unparse(node) for v in allow if not (isinstance(v, ast.Constant) and v.value is False)]
    return found


def test_no_pickle_is_executed() -> None:
    assert not {str(p.relative_to(ROOT)): unsafe(tree(p)) for p in FILES if unsafe(tree(p))}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "from torch import load",
        "np.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=flag)",
    ],
)
def test_the_pickle_check_can_fail(source: str) -> None:
    assert unsafe(ast.parse(source))


def test_networks_drop_by_the_images_own_noise() -> None:
    """By `noise.dropout`: what torch's modules let through depends on the batch. (Its kernels of attention do so.)"""
    for path in FILES:
        assert not re.search(r"nn\.(Alpha)?Dropout|functional\.dropout|F\.dropout", path.read_text(encoding="utf-8")), (
            path
        )


def test_no_test_measures_time() -> None:
    """A machine that is busy with something else would decide it. Speed is a ratio that `imagewright bench` reports."""
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        words = re.findall(r"perf_counter|process_time|timeit", path.read_text(encoding="utf-8"))
        assert not words or path == Path(__file__), path
