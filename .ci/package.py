"""`make package`: builds the sdist and, from it, the wheel; installs each into a clean environment and uses it there.

The environment is new and has this package from the file alone. What it depends on is lent by the environment that runs
this (by path, so nothing editable comes along); `--download` has the package index answer instead, as a user has it.
`--built` takes what lies in dist/.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "--version",
    "--help",
    "sample emoji64-32 --n 2 --steps 2 --out drawn",
    "data info digits",
    "train edm-digits --dry-run",
)


def run(*words: str | Path, cwd: Path = ROOT) -> str:
    """Run a program, which must end with 0; what it printed."""
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def use(archive: Path, commands: Sequence[str], folder: Path, download: bool) -> None:
    """Install an archive into a new environment below a folder, and run commands there."""
    venv.create(folder / "clean", with_pip=False)
    python = folder / "clean/bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-warn-script-location")
    if download:
        run(*pip, "--constraint", ROOT / "constraints.txt", archive)
    else:
        site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        run(*pip, "--no-deps", "--no-index", "--no-build-isolation", archive)
    where = Path(run(python, "-c", "import imagewright; print(imagewright.__file__)", cwd=folder).strip())
    if not where.is_relative_to(folder):
        raise SystemExit(f"the clean environment found {where}, which is not in it")
    if not where.with_name("py.typed").exists():
        raise SystemExit(f"{archive.name} has no py.typed")
    for words in commands:
        run(folder / "clean/bin/imagewright", *words.split(), cwd=folder)
    print(f"{archive.name}: installed alone, and ran {'; '.join(commands)}")


def main() -> None:
    """Build both, use both; they stay in dist/."""
    if "--built" not in sys.argv[1:]:
        shutil.rmtree(ROOT / "dist", ignore_errors=True)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist")
    built = sorted((ROOT / "dist").glob("imagewright-*"))
    if [path.suffix for path in built] != [".whl", ".gz"]:
        raise SystemExit(f"dist/ holds {', '.join(path.name for path in built) or 'nothing'}, not a wheel and an sdist")
    wheel, sdist = built
    for path, commands in ((wheel, COMMANDS), (sdist, COMMANDS[:3])):  # the wheel was made from the sdist
        with tempfile.TemporaryDirectory() as folder:
            use(path, commands, Path(folder).resolve(), "--download" in sys.argv[1:])


if __name__ == "__main__":
    main()
