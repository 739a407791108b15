"""What is published: the wheel's contents and page, what its dependencies suffice for, and each extra alone."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import imagewright

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LATE = ("matplotlib", "mpl_toolkits", "tensorboard", "grpc", "sklearn")
"""Installed with the package, and imported by nobody who draws no figure, writes no event and opens no digits."""
EXTRAS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "bench": ("imagewright.bench.speed", ("diffusers",)),
    "captions": ("imagewright.data.curation.matching", ("ahocorasick",)),
    "gcs": ("imagewright.data.remote", ("gcsfs",)),
    "hub": ("imagewright.interop.hub", ("huggingface_hub",)),
    "lpips": ("imagewright.metrics.perceptual", ("lpips", "torchvision")),
    "mlflow": ("imagewright.training.trackers", ("mlflow",)),
    "onnx": ("imagewright.interop.graphs", ("onnx", "onnxruntime", "onnxscript")),
    "parquet": ("imagewright.data.parquet", ("pyarrow.parquet",)),
    "s3": ("imagewright.data.remote", ("s3fs",)),
    "ssim": ("imagewright.metrics.reconstruction", ("torchmetrics",)),
    "trackio": ("imagewright.training.trackers", ("trackio",)),
    "transformers": ("imagewright.metrics.vision_transformers", ("transformers",)),
    "ui": ("imagewright.cli.play_page", ("nicegui",)),
    "wandb": ("imagewright.training.trackers", ("wandb",)),
    "words": ("imagewright.data.words", ("tokenizers",)),
}
"""Every extra of users: the module that asks for it, and what it asks for."""

ALONE = """
import importlib, json, os, re, sys, traceback
from importlib.machinery import PathFinder
from importlib.metadata import MetadataPathFinder
from pathlib import Path

class Only(PathFinder):
    hidden, gone = set(), set()
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in cls.hidden else super().find_spec(name, path, target)
    @classmethod
    def find_distributions(cls, context):  # packages ask their neighbours' versions, too
        found = MetadataPathFinder.find_distributions(context)
        return (each for each in found if re.sub("[-_.]+", "-", each.metadata["Name"]).lower() not in cls.gone)

places = [i for i, finder in enumerate(sys.meta_path) if finder is PathFinder]
sys.meta_path[places[0]] = Only
core, late, extras = json.loads(sys.argv[1])
Only.hidden, Only.gone = {*core[0], *late}, {*core[1]}
import imagewright
from imagewright.cli.main import main
main(["--help"])
main(["sample", "emoji64-32", "--n", "1", "--steps", "1", "--out", sys.argv[2]])
Only.hidden = {*core[0]}
root = Path(imagewright.__file__).parent
for path in sorted(root.rglob("*.py")):
    name = ".".join(("imagewright", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
    if ".report" in name or ".bench" in name or name.endswith((".__main__", ".kernels")):
        continue  # reports and benchmarks draw figures; kernels are for a GPU, whose torch brings Triton
    importlib.import_module(name)
print("early:", *sorted({name.partition(".")[0] for name in sys.modules} & {*late}))
for extra, (hidden, modules) in extras.items():
    sys.stdout.flush()
    child = os.fork()
    if not child:
        Only.hidden, Only.gone = ({*each} for each in hidden)
        try:
            for name in modules:
                importlib.import_module(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(extra, "fails" if os.waitpid(child, 0)[1] else "imports")
"""


def needed(requirements: Iterable[str]) -> set[str]:
    """Names of all distributions that these requirements bring along, of those that are installed."""
    found: set[tuple[str, str]] = set()
    waiting = [(Requirement(line), "") for line in requirements]
    while waiting:
        wanted, extra = waiting.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        for inner in ("", *wanted.extras):
            key = (re.sub(r"[-_.]+", "-", wanted.name).lower(), inner)
            if key in found:
                continue
            found.add(key)
            try:
                waiting += [(Requirement(line), inner) for line in metadata.requires(wanted.name) or ()]
            except metadata.PackageNotFoundError:
                found.discard(key)
    return {name for name, _ in found}


def hidden_from(requirements: Iterable[str]) -> tuple[list[str], list[str]]:
    """Top-level modules, and distributions, that are installed here and would not be with these requirements alone."""
    kept = needed(requirements)
    modules = sorted(module for module, owners in owned().items() if module != "imagewright" and not owners & kept)
    return modules, sorted(set().union(*owned().values()) - kept - {"imagewright"})


@cache
def owned() -> dict[str, set[str]]:
    """The distributions that each top-level module is of."""
    found = metadata.packages_distributions()
    return {module: {re.sub(r"[-_.]+", "-", name).lower() for name in names} for module, names in found.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One process that sees what the dependencies bring and nothing else, and a fork of it for each extra."""
    core, users = PROJECT["dependencies"], {}
    for extra, (module, packages) in EXTRAS.items():
        if all(importlib.util.find_spec(package.partition(".")[0]) for package in packages):
            hidden = hidden_from([*core, *PROJECT["optional-dependencies"][extra]])
            users[extra] = (hidden, (*packages, module))
    told = json.dumps((hidden_from(core), LATE, users))
    words = (sys.executable, "-c", ALONE, told, str(tmp_path_factory.mktemp("drawn")))
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [*done.stdout.splitlines(), done.stderr]


def test_the_dependencies_suffice_and_the_heavy_ones_come_late(alone: list[str]) -> None:
    """`--help`, `sample` and every module outside reports and benchmarks, without what only extras bring."""
    assert "imagewright COMMAND --help" in "\n".join(alone)
    assert "early:" in alone


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_needs_no_other(alone: list[str], extra: str) -> None:
    if f"{extra} imports" not in alone and f"{extra} fails" not in alone:
        pytest.skip(f"{extra} is not installed")
    assert f"{extra} imports" in alone, alone[-1][-3000:]


def test_every_extra_is_known() -> None:
    """Here, and in the workflow that installs each alone."""
    assert {*PROJECT["optional-dependencies"]} == {*EXTRAS, "dev", "docs"}
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["extras"]["strategy"]["matrix"]["extra"] == sorted(EXTRAS)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run((sys.executable, "-c", build, str(folder)), cwd=ROOT, capture_output=True, check=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: zipfile.ZipFile) -> None:
    ours = (ROOT / "src/imagewright").rglob("*")
    wanted = {str(p.relative_to(ROOT / "src")) for p in ours if p.is_file() and "__pycache__" not in p.parts}
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == wanted
    assert "imagewright/py.typed" in found


def test_the_page_on_an_index_leads_nowhere_relative(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith("/METADATA"))
    head, _, page = wheel.read(name).decode().partition("\n\n")
    links = re.findall(r"\]\(([^)]+)\)", page)
    shown = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert len(links) == len(shown) > 50
    for link, ours in zip(links, shown, strict=True):
        assert link.startswith(("https://", "#"))
        assert link.endswith(ours)
    assert "raw.githubusercontent.com" in next(link for link in links if ".png" in link)
    for word in ("Author: ", "Project-URL: Documentation, https://", "Classifier: Typing :: Typed", "Keywords: "):
        assert f"\n{word}" in head


def test_the_readmes_files_exist() -> None:
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "type", "license", "version", "url"} <= cited.keys()
    assert (cited["version"], cited["license"]) == (imagewright.__version__, PROJECT["license"])
    assert cited["repository-code"] == PROJECT["urls"]["Source"]
    assert PROJECT["authors"] == [{"name": cited["authors"][0]["name"]}]


@pytest.mark.parametrize("path", [".github/workflows/ci.yml", ".github/workflows/publish.yml", ".gitlab-ci.yml"])
def test_what_a_host_runs_is_there(path: str) -> None:
    text = (ROOT / path).read_text()
    assert yaml.safe_load(text)
    made = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = re.findall(r"\bmake ([a-z]+)", text)
    assert {*targets} <= {*made}
    for script in re.findall(r"python (\S+\.py)", text):
        assert (ROOT / script).exists(), script
