"""Every consistency and trajectory model from one teacher, side by side: a table and a sheet of pictures.

    python examples/flow_maps.py digits        # an hour or so on two cores
    python examples/flow_maps.py emoji64-32    # hours

Each is trained on equally many images, measured at one, two and four calls, and drawn from the same noises; table.json
and samples.png go to runs/flow-maps-DATA. The same call again goes on where it was interrupted.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imagewright import load
from imagewright.cli.main import main
from imagewright.files import read_json, write_json
from imagewright.models.segments import segment_stops
from imagewright.samplers import Heun
from imagewright.training.snapshots import grid, save_image

STOPS: dict[int, tuple[float, ...]] = {1: (), 2: (0.4,), 4: (4.0, 1.0, 0.3)}
"""Number of calls: noise levels on the way of a model that may stop anywhere. One choice for all, not searched."""
ANYWHERE = tuple(STOPS.values())
COLUMNS = 12


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training and the ways in which its model is drawn from."""

    name: str
    recipe: str
    options: str = ""
    teacher: str | None = "--teacher"
    """The option that names the teacher; None: it learns alone."""
    stops: tuple[tuple[float, ...], ...] = ()
    """One measurement for each; empty: as the recipe's sampler goes."""


def _multistep(segments: int) -> Row:
    stops = " ".join(map(str, segment_stops(segments)))
    options = f"--method.segments {segments} --sampler.sigmas {stops}"
    return Row(name=f"multistep CD, S = {segments}", recipe="mcd", options=options)


ROWS = (
    Row(name="CD", recipe="cd", stops=ANYWHERE),
    Row(name="CD, continuous time", recipe="ctcd", stops=ANYWHERE),
    Row(name="progressive distillation", recipe="pd"),
    *(_multistep(segments) for segments in (1, 2, 4)),
    Row(name="CTM", recipe="ctm", stops=ANYWHERE),
    Row(name="sCD", recipe="scd", stops=ANYWHERE),
    Row(name="sCT", recipe="sct", teacher="--start", stops=ANYWHERE),
    Row(name="CT", recipe="ct", teacher=None, stops=ANYWHERE),
    Row(name="iCT", recipe="ict", teacher=None, stops=ANYWHERE),
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A data set, its teacher, and the length of every training on it."""

    data: str
    rows: tuple[Row, ...]
    options: str
    teacher_recipe: str | None = None
    """Trained first; None: the teacher is the shipped model of the data's name."""


SETTINGS = {
    "digits": Setting(
        data="digits",
        rows=ROWS,
        options="--training.total-images 28000",
        teacher_recipe="edm-digits",
    ),
    "emoji64-32": Setting(
        data="emoji64-32",
        rows=tuple(row for row in ROWS if row.name in ("CD", "multistep CD, S = 4", "CTM", "sCD")),
        options="--training.total-images 6400 --training.batch 16 --training.channels-last "
        "--training.optimizer.lr-cooldown-images 3200 --training.ema.halflife-images 1000",
    ),
}


def run(setting: Setting) -> None:
    """Train and measure what has not been, then write the table and the sheet."""
    out = Path("runs") / f"flow-maps-{setting.data}"
    teacher = setting.data
    if setting.teacher_recipe is not None:
        teacher = str(out / "teacher")
        _command(f"train {setting.teacher_recipe} --out {teacher} --resume")
    scores = out / "teacher.json"
    if not scores.exists():
        out.mkdir(parents=True, exist_ok=True)
        _command(f"evaluate {teacher} --sampler euler --steps 1 2 4 --out {scores}")
        _command(f"evaluate {teacher} --sampler heun --steps 18 --out {scores}")
    folders = {row: out / _folder_name(row) for row in setting.rows}
    for row, folder in folders.items():
        source = f"{row.teacher} {teacher}" if row.teacher else ""
        _command(f"train {row.recipe}-{setting.data} {source} {setting.options} {row.options} --out {folder} --resume")
        if not (folder / "metrics.json").exists():
            for stops in row.stops:
                _command(f"evaluate {folder} --set sigmas=[{','.join(map(str, stops))}]")
            if not row.stops:
                _command(f"evaluate {folder}")
    table = {"teacher": _scores(scores)} | {row.name: _scores(f / "metrics.json") for row, f in folders.items()}
    write_json(out / "table.json", {"data": setting.data, "options": setting.options, "rows": table})
    _sheet(teacher, [str(folder) for folder in folders.values()], out / "samples.png")


def _folder_name(row: Row) -> str:
    return "".join(c if c.isalnum() else "-" for c in row.name.lower())


def _command(line: str) -> None:
    print(f"\n$ imagewright {line}", flush=True)
    main(shlex.split(line))


def _scores(path: Path) -> list[dict[str, Any]]:
    return [{"nfe": entry["nfe"], **entry["report"]["scores"]} for entry in read_json(path)["reports"]]


def _sheet(teacher: str, students: list[str], path: Path) -> None:
    """A row a model: the teacher in 18 Heun steps, then every student as its recipe draws."""
    labels = np.arange(COLUMNS) % load(teacher).spec.num_classes
    generators = [load(teacher, Heun(num_steps=18)), *map(load, students)]
    rows = [generator.generate(COLUMNS, labels=labels, seed=3) for generator in generators]
    save_image(path, grid(np.concatenate(rows), COLUMNS), scale=64 // rows[0].shape[1])


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in SETTINGS:
        sys.exit(f"usage: python examples/flow_maps.py {{{','.join(SETTINGS)}}}")
    run(SETTINGS[sys.argv[1]])
