"""All methods of a family from one teacher, side by side: a table and a sheet of pictures.

    python examples/side_by_side.py flow-maps-digits        # an hour or so on two cores
    python examples/side_by_side.py matching-digits 0 1 2   # three trainings of every row
    python examples/side_by_side.py flows-digits            # flows beside some of both, half an hour
    python examples/side_by_side.py calls-digits            # distance against calls, 1 to 16, of every kind of flow map
    python examples/side_by_side.py emoji64-32 0 1          # some of both families, hours on two cores
    python examples/side_by_side.py emoji64-32 --images 320 --scored 473 --steps 6    # the same, cut short
    python examples/side_by_side.py matching-digits --rows Diff-Instruct SiD          # some of its rows

Flow maps are the consistency and trajectory models, measured at one, two and four calls; `matching-...` are the
one-step generators that match distributions; `flows-...` are the reflowed ones, at up to nine calls. In a family on
digits the product gets equally many updates, of as many images, and so does a stage before it; on emoji every row may
do as many passes through networks as CD does with so many images. Scores are of classes drawn as often as the reference
has them (`imagewright evaluate`).
Seeds are those of the trainings; teacher, pairs and the noises that are drawn from are the same for all. table.json,
with the scores of every seed, and samples.png, of the first, go to runs/NAME, or runs/NAME-IMAGES where the number of
images is another than the setting's. The same call again goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from imagewright import load
from imagewright.cli.main import main
from imagewright.files import read_json, replacing, write_json
from imagewright.methods.dsno import OperatorDistillation
from imagewright.models.segments import segment_stops
from imagewright.report.figures import COLOURS, MARKERS
from imagewright.samplers import Heun
from imagewright.samplers.generator import ImageGenerator
from imagewright.training.snapshots import grid

STOPS: dict[int, tuple[float, ...]] = {1: (), 2: (0.4,), 4: (4.0, 1.0, 0.3)}
"""Number of calls: noise levels on the way of a model that may stop anywhere. One choice for all, not searched."""
ANYWHERE = tuple(f"--set sigmas=[{','.join(map(str, stops))}]" for stops in STOPS.values())
EULER = tuple(f"--set order=1 --steps {calls}" for calls in (1, 2, 4, 9))
CALLS: dict[int, tuple[float, ...]] = {
    **STOPS,
    8: (20.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.2),
    16: (40.0, 25.0, 16.0, 10.0, 7.0, 5.0, 3.5, 2.5, 1.7, 1.2, 0.8, 0.5, 0.3, 0.15, 0.06),
}
"""The same up to 16 calls."""
UP_TO_16 = tuple(f"--set sigmas=[{','.join(map(str, stops))}]" for stops in CALLS.values())
COLUMNS = 12


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training and the ways in which its model is drawn from."""

    name: str
    recipe: str
    """Without the data set, which takes the place of {}, or is appended."""
    options: str = ""
    teacher: str | None = "--teacher"
    """The option that names the teacher; None: it learns alone."""
    steps: int = 1
    """Steps of the trainer in which the product is updated once."""
    couplings: bool = False
    """Whether it learns from the teacher's pairs."""
    phased: bool = False
    """Whether the fake network learns alone first, and ratio and adversary come later still."""
    parts: tuple[str, ...] = ()
    """Classes of its students, which share its images and are joined; empty: there is one, of all."""
    ways: tuple[str, ...] = ()
    """Options of `evaluate`, one measurement for each; empty: as the recipe's sampler goes."""
    points: bool = False
    """Whether those have points of the trajectories on the way."""
    real_pairs: bool = False
    """Whether it learns from real images' pairs too, the recipe's share of them."""
    before: tuple[str, str] | None = None
    """The recipe of the stage before, and the option by which the product is given."""
    passes: int = 6
    """Of an update of the product, with all that it takes of other networks: a call is 1, a gradient through it 2 more.
    CD has a Heun step of the teacher, one call of the target, one of the student and its gradient."""


def _multistep(segments: int) -> Row:
    stops = " ".join(map(str, segment_stops(segments)))
    options = f"--method.segments {segments} --sampler.sigmas {stops}"
    return Row(name=f"multistep CD, S = {segments}", recipe="mcd", options=options)


FLOW_MAPS = (
    Row(name="CD", recipe="cd", ways=ANYWHERE),
    Row(name="CD, continuous time", recipe="ctcd", ways=ANYWHERE),
    Row(name="progressive distillation", recipe="pd"),
    *(_multistep(segments) for segments in (1, 2, 4)),
    Row(name="CTM", recipe="ctm", ways=ANYWHERE),
    Row(name="sCD", recipe="scd", ways=ANYWHERE),
    Row(name="sCT", recipe="sct", teacher="--start", ways=ANYWHERE),
    Row(name="CT", recipe="ct", teacher=None, ways=ANYWHERE),
    Row(name="iCT", recipe="ict", teacher=None, ways=ANYWHERE),
)
MATCHING = (
    Row(name="DMD", recipe="dmd", couplings=True),
    Row(name="DMD2, no adversary", recipe="dmd2", steps=5),
    Row(name="DMD2", recipe="dmd2-{}-gan", steps=5),
    Row(name="Diff-Instruct", recipe="diff-instruct"),
    Row(name="SIM", recipe="sim"),
    Row(name="SiD", recipe="sid"),
    Row(name="f-distill (JS)", recipe="f-distill", steps=5),
    Row(name="Uni-Instruct, RKL", recipe="uni-rkl", phased=True),
    Row(name="Uni-Instruct, FKL", recipe="uni-fkl", phased=True),
    Row(name="Uni-Instruct, JKL", recipe="uni-jkl", phased=True),
)
FLOWS = (
    FLOW_MAPS[0],
    FLOW_MAPS[1],
    MATCHING[0],
    Row(name="2-rectified flow++", recipe="rfpp", couplings=True, ways=EULER),
    Row(
        name="Simple ReFlow",
        recipe="simple-reflow",
        couplings=True,
        real_pairs=True,
        ways=(*EULER[:3], "--steps 5"),
    ),
    Row(
        name="SlimFlow, a quarter of the size",
        recipe="slimflow-{}-distil",
        teacher=None,
        couplings=True,
        before=("slimflow-{}", "--flow"),
    ),
    Row(
        name="constant acceleration",
        recipe="caf",
        teacher=None,
        couplings=True,
        before=("caf-{}-velocity", "--velocity"),
        ways=tuple(f"--steps {calls - 1}" for calls in (2, 4, 9)),
    ),
)

MAPS = (
    Row(name="CD", recipe="cd", ways=UP_TO_16),
    Row(name="iCT, from its weights", recipe="ict", teacher="--start", ways=UP_TO_16, passes=4),
    *(replace(_multistep(segments), passes=5) for segments in (1, 4, 16)),
    Row(name="CTM", recipe="ctm", ways=UP_TO_16, passes=17),
    Row(name="sCD", recipe="scd", ways=UP_TO_16),
    Row(name="Align Your Flow", recipe="ayf", ways=tuple(f"--steps {calls}" for calls in CALLS), passes=7),
    Row(name="VCT on ECM, from its weights", recipe="vct-ecm", teacher="--start", ways=UP_TO_16, passes=5),
    Row(name="DSNO", recipe="dsno", couplings=True, points=True, passes=12),
    Row(
        name="guided distillation",
        recipe="guided",
        options="--method.weights 1 1.001",
        ways=("--weight 1",),
        passes=7,
    ),
)

EMOJI = (
    Row(name="CD", recipe="cd", ways=ANYWHERE[:1]),
    Row(name="sCD", recipe="scd", ways=ANYWHERE[:1]),
    Row(name="CTM", recipe="ctm", ways=ANYWHERE[:1], passes=17),
    Row(name="DMD2", recipe="dmd2-{}-gan", steps=5, passes=57),
    Row(name="SiD", recipe="sid", passes=13),
    Row(name="Uni-Instruct, JKL", recipe="uni-jkl", phased=True, passes=16),
    Row(name="EMD, K = 4", recipe="em-distillation", passes=28),
    Row(name="SMD", recipe="smd", steps=5, passes=77),
    Row(name="SMT, warmed up", recipe="smt", teacher="--warmup", steps=5, passes=73),
    Row(name="MSD, two students", recipe="multi-student", couplings=True, parts=("0-4", "5-8"), passes=11),
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A data set, its teacher, and the length of every training on it."""

    data: str
    rows: tuple[Row, ...]
    images: int
    """From which each product learns; with `equal_passes` CD, the others from as many fewer as their update costs."""
    equal_passes: bool = False
    cooldown: bool = False
    """Lower the rate to zero over the last half, whatever the recipe's own length has."""
    options: str = ""
    pairs: int = 0
    """Couplings drawn for those that need them."""
    scored: int | None = None
    """Images of every measurement; None: as many as there are real ones."""
    teacher_steps: tuple[int, tuple[int, ...]] = (18, (1, 2, 4))
    """Of Heun, and of Euler, with which the teacher is measured."""
    teacher_recipe: str | None = None
    """Trained first; None: the teacher is the shipped model of the data's name."""


SETTINGS = {
    "flow-maps-digits": Setting(data="digits", rows=FLOW_MAPS, images=28_000, teacher_recipe="edm-digits"),
    "matching-digits": Setting(
        data="digits", rows=MATCHING, images=9_600, cooldown=True, pairs=3_000, teacher_recipe="edm-digits"
    ),
    "flows-digits": Setting(
        data="digits",
        rows=FLOWS,
        images=28_000,
        cooldown=True,
        pairs=5_000,
        teacher_recipe="edm-digits",
        teacher_steps=(18, (1, 2, 4, 9)),
    ),
    "calls-digits": Setting(
        data="digits",
        rows=MAPS,
        images=28_000,
        equal_passes=True,
        cooldown=True,
        pairs=5_000,
        teacher_recipe="guided-digits-teacher",
        teacher_steps=(18, (1, 2, 4, 8, 16)),
    ),
    "emoji64-32": Setting(
        data="emoji64-32",
        rows=EMOJI,
        images=6_400,
        equal_passes=True,
        cooldown=True,
        options="--training.batch 16 --training.channels-last --training.ema.halflife-images 200",
        pairs=1_000,
        scored=946,
        teacher_steps=(12, (1,)),
    ),
}


def run(out: Path, setting: Setting, seeds: Sequence[int]) -> None:
    """Train and measure what has not been, then write the table and the sheet."""
    teacher = setting.data
    if setting.teacher_recipe is not None:
        teacher = str(out / "teacher")
        if not (Path(teacher) / "model.json").exists():  # rows that are trained beside each other share it
            _command(f"train {setting.teacher_recipe} --out {teacher} --resume")
    scores = out / "teacher.json"
    if not scores.exists():
        out.mkdir(parents=True, exist_ok=True)
        heun, euler = setting.teacher_steps
        n = _count(setting)
        _command(f"evaluate {teacher} {n} --sampler euler --steps {' '.join(map(str, euler))} --out {scores}")
        _command(f"evaluate {teacher} {n} --sampler heun --steps {heun} --out {scores}")
    if any(row.couplings for row in setting.rows):
        points = any(row.points for row in setting.rows)
        times = f"--times {' '.join(map(str, OperatorDistillation().path_times))}" if points else ""
        _command(f"couple {teacher} --n {setting.pairs} --sampler heun --steps 18 {times} --out {out}/couplings")
    if any(row.real_pairs for row in setting.rows):
        _command(f"couple {teacher} --invert {setting.data} --sampler heun --steps 18 --out {out}/couplings-real")
    folders = {row: [out / f"seed-{seed}" / _folder_name(row) for seed in seeds] for row in setting.rows}
    for row, places in folders.items():
        for seed, folder in zip(seeds, places, strict=True):
            _students(row, setting, teacher, folder, seed)
            _measure(row, setting, folder)
    students = {row.name: [_scores(folder / "metrics.json") for folder in places] for row, places in folders.items()}
    table = {"data": setting.data, "images": setting.images, "scored": setting.scored, "seeds": list(seeds)}
    table |= {"teacher": _scores(scores), "students": students}
    write_json(out / "table.json", table)
    _curves(table, out / "calls.png")
    steps = setting.teacher_steps[0]
    shown = {f"teacher, {2 * steps - 1} calls": load(teacher, Heun(num_steps=steps))}
    _sheet(shown | {row.name: str(places[0]) for row, places in folders.items()}, out / "samples.png")


def _curves(table: Mapping[str, Any], path: Path) -> None:
    """Distance against network calls, both logarithmic; means over the seeds. A model of one number is a dot."""
    score = next(name for name in table["teacher"][0] if name.startswith("fd_"))
    figure = Figure(figsize=(7.6, 4.4), layout="constrained", dpi=120)
    axes = figure.subplots()
    rows = {"teacher (Euler; last: Heun)": [table["teacher"]], **table["students"]}
    for i, (name, seeds) in enumerate(rows.items()):
        calls = [entry["nfe"] for entry in seeds[0]]
        means = [float(np.mean([entries[k][score] for entries in seeds])) for k in range(len(calls))]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]
        dashes = "-" if i < len(COLOURS) else "--"
        axes.loglog(calls, means, label=name, color=colour, marker=marker, ls=dashes, lw=1.4, ms=5)
    axes.set_xlabel("network calls for an image")
    axes.set_ylabel(f"{score}, lower is better")
    axes.set_xticks(list(CALLS), labels=map(str, CALLS))
    axes.grid(alpha=0.2, which="both")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with replacing(path) as aside:
        figure.savefig(aside, format="png")


def _students(row: Row, setting: Setting, teacher: str, folder: Path, seed: int) -> None:
    """A row's training, or those of its parts and one model of them."""
    if not row.parts:
        _train(row, setting, teacher, folder, seed)
        return
    places = [folder / f"part-{part}" for part in row.parts]
    shared = replace(setting, images=setting.images // len(row.parts))
    for part, place in zip(row.parts, places, strict=True):
        _train(replace(row, options=f"{row.options} --data.classes {part}"), shared, teacher, place, seed)
    if not (folder / "model.safetensors").exists():
        _command(f"join {' '.join(map(str, places))} --out {folder}")


def _train(row: Row, setting: Setting, teacher: str, folder: Path, seed: int) -> None:
    """A training, from where it stands."""
    total = _product_images(row, setting) * row.steps
    words = [f"--resume --training.seed {seed} --training.total-images {total}", setting.options]
    if setting.cooldown:
        words.append(f"--training.optimizer.lr-cooldown-images {total // 2}")
    if row.couplings:
        stores = f"{folder.parents[2 if row.parts else 1]}/couplings"
        words.append(f"--data.couplings {stores} {f'{stores}-real' if row.real_pairs else ''}")
    if row.before:
        first = f"{folder}-before"
        _command(" ".join([f"train {named(row.before[0], setting)} --out {first}", *words]))
        words.append(f"{row.before[1]} {first}")
    words.append(row.options)
    if row.teacher:
        words.append(f"{row.teacher} {teacher}")
    if row.phased:
        words.append(f"--method.fake-only-images {total // 10} --method.plain-images {total // 5}")
    _command(" ".join([f"train {recipe_of(row, setting)} --out {folder}", *words]))


def recipe_of(row: Row, setting: Setting) -> str:
    """The name of a row's recipe."""
    return named(row.recipe, setting)


def named(recipe: str, setting: Setting) -> str:
    """A recipe's name with that of the data set."""
    return recipe.format(setting.data) if "{}" in recipe else f"{recipe}-{setting.data}"


def _product_images(row: Row, setting: Setting) -> int:
    return setting.images * EMOJI[0].passes // row.passes if setting.equal_passes else setting.images


def _count(setting: Setting) -> str:
    return f"--n {setting.scored}" if setting.scored else ""


def _measure(row: Row, setting: Setting, folder: Path) -> None:
    """The scores of a row that are not there yet."""
    done = len(_scores(folder / "metrics.json")) if (folder / "metrics.json").exists() else 0
    for way in (row.ways or ("",))[done:]:
        _command(f"evaluate {folder} {_count(setting)} {way} --metrics fd prdc --no-yardsticks")


def _folder_name(row: Row) -> str:
    return "".join(c if c.isalnum() else "-" for c in row.name.lower())


def _command(line: str) -> None:
    print(f"\n$ imagewright {line}", flush=True)
    main(shlex.split(line))


def _scores(path: Path) -> list[dict[str, Any]]:
    return [{"nfe": entry["nfe"], **entry["report"]["scores"]} for entry in read_json(path)["reports"]]


def _sheet(models: Mapping[str, str | ImageGenerator], path: Path) -> None:
    """A row a model, from the same noises, a column a class; students as their recipes draw."""
    generators = {name: load(model) if isinstance(model, str) else model for name, model in models.items()}
    spec = next(iter(generators.values())).spec
    labels = np.arange(COLUMNS) % spec.num_classes
    rows = [generator.generate(COLUMNS, labels=labels, seed=3) for generator in generators.values()]
    picture, step = grid(np.concatenate(rows), COLUMNS), rows[0].shape[1] + 1
    figure = Figure(figsize=(0.6 * COLUMNS + 2.6, 0.6 * len(rows) + 0.5), layout="constrained", dpi=110)
    axes = figure.subplots()
    axes.imshow(picture.squeeze(), cmap="gray", interpolation="nearest")
    axes.set_yticks([(i + 0.5) * step for i in range(len(rows))], labels=list(generators))
    axes.set_xticks([(i + 0.5) * step for i in range(COLUMNS)], labels=[spec.class_names[label] for label in labels])
    axes.tick_params(length=0, labelsize=8, top=True, labeltop=True, bottom=False, labelbottom=False)
    if max(map(len, spec.class_names)) > 8:
        axes.tick_params("x", rotation=30)
    axes.spines[:].set_visible(False)
    with replacing(path) as aside:
        figure.savefig(aside, format="png", bbox_inches="tight")


def chosen(words: Sequence[str] | None = None) -> tuple[Path, Setting, list[int]]:
    """Folder, setting and seeds that a command line asks for. Ends the program on another name or number."""
    parser = argparse.ArgumentParser(description="All methods of a family from one teacher, side by side.")
    parser.add_argument("name", choices=SETTINGS)
    parser.add_argument("seeds", nargs="*", type=int, help="of the trainings (default: 0)")
    parser.add_argument("--images", type=int, help="from which each product learns, in place of the setting's")
    parser.add_argument("--scored", type=int, help="images of every measurement")
    parser.add_argument("--steps", type=int, help="of Heun, with which the teacher is measured and drawn")
    parser.add_argument("--pairs", type=int, help="drawn for those that learn from them")
    parser.add_argument("--rows", nargs="+", help="names of methods, as the table has them (default: all)")
    asked = parser.parse_args(words)
    setting, name = SETTINGS[asked.name], asked.name
    known = {row.name: row for row in setting.rows}
    if asked.rows is not None:
        if not set(asked.rows) <= known.keys():
            parser.error(f"--rows of {name} are: {', '.join(map(repr, known))}")
        setting = replace(setting, rows=tuple(known[row] for row in asked.rows))
    if asked.images is not None:
        setting, name = replace(setting, images=asked.images), f"{name}-{asked.images}"
    if asked.scored is not None:
        setting = replace(setting, scored=asked.scored)
    if asked.pairs is not None:
        setting = replace(setting, pairs=asked.pairs)
    if asked.steps is not None:
        setting = replace(setting, teacher_steps=(asked.steps, setting.teacher_steps[1]))
    return Path("runs") / name, setting, asked.seeds or [0]


if __name__ == "__main__":
    run(*chosen())
