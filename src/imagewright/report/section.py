"""One run on the page: samples, trajectory, training, measures, neighbours, and how to repeat it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from imagewright.report.collect import Images, Measure, Missing, Neighbours, RunSection, Trajectory
from imagewright.report.figures import (
    loss_curves,
    loss_figure,
    quality_curves,
    quality_figure,
    rate_curves,
    rate_figure,
    sampler_words,
    trajectory_sheets,
)
from imagewright.report.likelihood import likelihood_card
from imagewright.report.markup import (
    Child,
    Html,
    card,
    command,
    count,
    el,
    enlargeable,
    join,
    number,
    picture,
    png,
    table,
)
from imagewright.training.record import repeat_command

YARDSTICKS = (("noise", "noise"), ("gaussian", "Gaussian fit"), ("floor", "floor (real images)"))
"""Fields of `metrics.Yardstick` and their names on the page."""


def run_section(run: RunSection, anchor: str, title: str) -> Html:
    """A run in full. anchor: the id of its <section>, also the start of all ids inside."""
    losses, qualities = _loss_cards(run, anchor), _quality_cards(run, anchor)
    return el(
        "section",
        el("h2", title, id=f"{anchor}-title"),
        el("p", _summary(run), class_="quiet"),
        _facts(run),
        _samples(run),
        _trajectory(run),
        el("div", *losses, *qualities, class_="pair"),
        _snapshots(run, anchor),
        _measures(run),
        likelihood_card([(run.name, run.likelihoods)]),
        _neighbours(run),
        _repeat(run),
        id=anchor,
        aria_labelledby=f"{anchor}-title",
    )


def shown_measure(run: RunSection) -> Measure | None:
    """The measurement of what the pictures show: with as many network calls as they were drawn with."""
    return best([m for m in run.measures if m.nfe == run.sampler_nfe])


def best(measures: Sequence[Measure]) -> Measure | None:
    """The measurement with the lowest distance."""
    scored = [m for m in measures if m.distance]
    return min(scored, key=lambda m: m.distance[1] if m.distance else 0.0, default=None)


def missing(reason: Missing) -> Html:
    """One sentence on what is not there, and the command that makes it."""
    return el("p", reason.reason, command(reason.command) if reason.command else None, class_="missing")


# --- head ---------------------------------------------------------------------------------------------------


def _summary(run: RunSection) -> str:
    data, origin = run.data, run.model.get("origin", {})
    words = [f"Method {run.method}"]
    if data:
        size = f"{data['resolution']}×{data['resolution']}, {'grey' if data['channels'] == 1 else 'colour'}"
        classes = f", {data['num_classes']} classes" if data["num_classes"] else ", no classes"
        words.append(f"data {data['name']} ({size}{classes})")
    if origin.get("teacher"):
        words.append(f"teacher {origin['teacher']}")
    if run.model.get("sampler"):
        words.append(f"default sampler {sampler_words(run.model['sampler'])}")
    if run.weight is not None:
        low, high = run.model["model"]["weights"]
        words.append(f"told the strength of guidance, {low:g} to {high:g}, here {run.weight:g}")
    return "; ".join(words) + "."


def _facts(run: RunSection) -> Html | None:
    """The numbers one looks for first."""
    facts: list[tuple[str, str]] = []
    measure = best(run.measures)
    if measure is not None and measure.distance is not None:
        facts += [(f"best {measure.distance[0]}", number(measure.distance[1])), ("at NFE", str(measure.nfe))]
    elif run.sampler_nfe is not None:
        facts.append(("NFE per image", str(run.sampler_nfe)))
    if run.parameters is not None:
        facts.append(("parameters", count(run.parameters)))
    seen = run.model.get("origin", {}).get("images_seen") or (run.log[-1]["images"] if run.log else None)
    if seen is not None:
        facts.append(("images seen", count(seen)))
    if run.log and run.log[-1].get("images_per_second"):
        facts.append(("images/s, training", count(run.log[-1]["images_per_second"])))
    if measure is not None and measure.images_per_second is not None:
        facts.append(("images/s, sampling", count(measure.images_per_second)))
    entries = (el("div", el("dt", name), el("dd", value)) for name, value in facts)
    return el("dl", *entries, class_="facts") if facts else None


# --- what it draws ------------------------------------------------------------------------------------------


def _samples(run: RunSection) -> Html:
    if not run.classes:
        return card("Samples", missing(run.missing["model"]))
    known = run.data["num_classes"]
    rows = []
    for row in run.classes:
        alt = f"{len(row.images)} samples" + (f" of class {row.name}" if known else f", row {row.name}")
        rows.append((row.name, picture(row.images, len(row.images), alt, side=96)))
    some = f" {len(run.classes)} of {known} classes." if known > len(run.classes) else ""
    caption = f"Not chosen: the first images of seed {run.seed}, {run.sampler_nfe} NFE each.{some}"
    return card("Samples", strips(("class" if known else "row", "samples"), rows, caption))


def strips(head: Sequence[Child], rows: Iterable[Sequence[Child]], caption: str, class_: str = "") -> Html:
    """A table of pictures whose first column says what they are."""
    top = el("tr", *(el("th", cell, scope="col") for cell in head))
    body = (el("tr", el("th", first, scope="row"), *(el("td", cell) for cell in rest)) for first, *rest in rows)
    parts = (el("caption", caption), el("thead", top), el("tbody", *body))
    return el("table", *parts, class_=f"strips {class_}".strip())


def _trajectory(run: RunSection) -> Html | None:
    if run.trajectory is None:
        return None
    if run.trajectory.tokens:
        return _filling(run.trajectory)
    path = run.trajectory.thinned()
    n, columns = path.x.shape[1], len(path.sigmas)
    sheets = trajectory_sheets(path)
    if columns == 1:
        alt = f"{n} images: noise on the left, the image that the model jumps to on the right"
        jump = el("div", _ticks(["noise", "image"]), picture(sheets[0], 2, alt, side=96), class_="narrow")
        text = f"One jump from noise (σ = {_sigma(path.sigmas[0])}) to the image: the whole of the way."
        return card("From noise to image", el("p", text, class_="quiet"), jump)
    ticks = _ticks([_sigma(s) for s in path.sigmas])
    kinds = ("State x, clipped", "Estimate of the clean image")
    figures = (_sheet(sheet, kind, ticks, n, columns) for sheet, kind in zip(sheets, kinds, strict=True))
    text = f"{_shown(run.trajectory, columns)}, left to right; the number above a column is the noise level σ of x."
    return card("From noise to image", el("p", text, class_="quiet"), *figures)


def _filling(trajectory: Trajectory) -> Html:
    """The same for a token model, whose steps put tokens in place."""
    path = trajectory.thinned()
    n, columns = path.x.shape[1], len(path.sigmas)
    ticks = _ticks([f"{share:.0%}" for share in path.sigmas])
    (sheet,) = trajectory_sheets(path)
    text = (
        f"{_shown(trajectory, columns)}, left to right; the number above a column is the share of tokens that were"
        " unknown before that step."
    )
    figure = _sheet(sheet, "Tokens as drawn", ticks, n, columns)
    return card("From tokens to image", el("p", text, class_="quiet"), figure)


def _sheet(sheet: Images, kind: str, ticks: Html, n: int, columns: int) -> Html:
    alt = f"{n} images (rows) over {columns} steps (columns): {kind}"
    wide = el("div", ticks, picture(sheet, columns, alt, side=96), class_="wide")
    scroll = el("div", wide, class_="scroll", tabindex=0, role="region", aria_label=f"Trajectory: {kind}")
    return el("figure", el("figcaption", kind), scroll)


def _shown(trajectory: Trajectory, columns: int) -> str:
    steps = len(trajectory.sigmas)
    return f"{steps} steps" if steps == columns else f"{columns} of {steps} steps"


def _ticks(labels: Sequence[str]) -> Html:
    return el("div", *(el("span", label) for label in labels), class_="ticks")


def _sigma(value: float) -> str:
    return f"{value:.0f}" if value >= 10 or value == 0 else f"{value:.1g}" if value < 0.1 else f"{value:.2g}"


# --- how it was trained -------------------------------------------------------------------------------------


def _loss_cards(run: RunSection, anchor: str) -> list[Html]:
    curves = loss_curves(run.log)
    if not curves:
        return [card("Loss", missing(run.missing.get("log") or Missing(reason="The log holds no losses.")))]
    cards = [
        card(f"Loss of the {part}", el("figure", loss_figure(part, lines, f"{anchor}-loss{i}")))
        for i, (part, lines) in enumerate(curves.items())
    ]
    rates = rate_curves(run.log)
    return [*cards, card("Learning rate", el("figure", rate_figure(rates, f"{anchor}-rate")))] if rates else cards


def _snapshots(run: RunSection, anchor: str) -> Html:
    if not run.snapshots:
        return card("Snapshots", missing(run.missing["snapshots"]))
    thumbs = []
    for i, shot in enumerate(run.snapshots):
        when = f"after {count(shot.images_seen)} images"
        grid = enlargeable(png(shot.png, f"grid of samples {when}"), f"samples {when}", f"{anchor}-shot{i}")
        thumbs.append(el("figure", grid, el("figcaption", when)))
    text = "The same noise and classes at every snapshot, drawn with the averaged weights."
    return card("Snapshots during training", el("p", text, class_="quiet"), el("div", *thumbs, class_="thumbs"))


# --- how good it is -----------------------------------------------------------------------------------------


def _quality_cards(run: RunSection, anchor: str) -> list[Html]:
    if not run.measures:
        return [card("Quality against cost", missing(run.missing["measures"]))]
    return quality_cards([(run.name, run.measures)], f"{anchor}-quality")


def quality_cards(named: Sequence[tuple[str, Sequence[Measure]]], prefix: str) -> list[Html]:
    """A figure for each distance: curves of the named runs, with yardsticks. prefix: of ids in the figures."""
    everything = [m for _, measures in named for m in measures]
    return [
        card(
            f"{score} against cost",
            el("figure", quality_figure(score, curves, yardsticks(everything, score), f"{prefix}{i}")),
        )
        for i, (score, curves) in enumerate(quality_curves(named).items())
    ]


def _measures(run: RunSection) -> Html | None:
    stale = missing(run.missing["stale"]) if "stale" in run.missing else None
    if not run.measures:
        return card("Measures", stale) if stale else None
    notes = dict.fromkeys(note for m in run.measures for note in m.report.get("notes", ()))
    listed = el("ul", *(el("li", note) for note in notes), class_="quiet") if notes else None
    return card("Measures", _measures_table(run.measures), listed, stale)


def yardsticks(measures: Sequence[Measure], score: str) -> dict[str, float]:
    """The yardsticks of a score by their name on the page, from the first report that has them."""
    for measure in measures:
        stick = measure.report.get("yardsticks", {}).get(score)
        if stick:
            return {name: float(stick[field]) for field, name in YARDSTICKS}
    return {}


def _measures_table(measures: Sequence[Measure]) -> Html:
    names = list(dict.fromkeys(s for m in measures for s in m.report["scores"] if not _is_spread(s)))
    rows: list[list[Child]] = [
        [
            sampler_words(m.sampler) + (", all classes alike" if (m.classes or {}).get("law") == "uniform" else ""),
            str(m.nfe),
            f"{m.report['num_images']:,}",
            *(_score(m.report["scores"], name) for name in names),
            number(m.seconds or None),
            number(m.images_per_second),
            number(None if m.peak_bytes is None else m.peak_bytes / 2**30),
        ]
        for m in measures
    ]
    for stick in dict(YARDSTICKS).values():
        values = [yardsticks(measures, name).get(stick) for name in names]
        if any(v is not None for v in values):
            rows.append(
                [f"yardstick: {stick}", "", "", *(number(v) if v is not None else "" for v in values), "", "", ""]
            )
    reference = sorted({f"{m.report['num_reference']:,}" for m in measures if m.report.get("num_reference")})
    against = f" Against {' / '.join(reference)} real images." if reference else ""
    caption = (
        "Distances (fd, kd, fid, kid): lower is better; all others: higher is better."
        " The number after ± is the standard error of a kernel distance, the standard deviation over splits of a"
        " classifier score (is). Seconds and memory (a GPU's, or the process's) are of drawing the images."
        f"{against}"
    )
    return table(["sampler", "NFE", "images", *names, "seconds", "images/s", "GiB"], rows, caption)


def _is_spread(score: str) -> bool:
    return score.endswith(("_std", "_stderr"))


def _score(scores: Mapping[str, float], name: str) -> str:
    spread = scores.get(f"{name}_stderr", scores.get(f"{name}_std"))
    value = number(scores.get(name))
    return value if spread is None else f"{value} ± {number(spread, 2)}"


# --- whether it copies --------------------------------------------------------------------------------------


def _neighbours(run: RunSection) -> Html | None:
    if not run.neighbours or run.first_images is None:
        reason = run.missing.get("neighbours")
        return card("Nearest training images", missing(reason)) if reason else None
    rows = []
    for i in range(len(run.neighbours[0].real)):
        label = f", class {run.first_labels[i]}" if run.first_labels else ""
        sample = picture(run.first_images[i : i + 1], 1, f"sample {i}{label}", side=96)
        rows.append((sample, *(_nearest(near, i) for near in run.neighbours)))
    caption = (
        f"The first samples of seed {run.seed} and, nearest first, the training images closest to them among"
        f" {run.num_real:,}, with Euclidean distances. A model that copies shows pairs far closer than unseen"
        " real images are."
    )
    typical = el("ul", *(el("li", _typical(n)) for n in run.neighbours), class_="quiet")
    head = ("sample", *(f"nearest in {n.space}" for n in run.neighbours))
    return card("Nearest training images", strips(head, rows, caption, "near"), typical)


def _nearest(near: Neighbours, i: int) -> Html:
    distances = [number(float(d)) for d in near.distances[i]]
    which = ", ".join(f"{index} at {d}" for index, d in zip(near.indices[i], distances, strict=True))
    alt = f"nearest in {near.space}: training images {which}"
    strip = picture(near.real[i], len(distances), alt, side=96)
    return join(strip, el("div", *(el("span", d) for d in distances), class_="ticks"))


def _typical(near: Neighbours) -> str:
    held_out = "" if near.held_out is None else f", of unseen real images {number(near.held_out)}"
    return f"Median distance to the nearest in {near.space}: of samples {number(near.typical)}{held_out}."


# --- how to do it again -------------------------------------------------------------------------------------


def _repeat(run: RunSection) -> Html:
    commands: list[Child] = [command(words)] if (words := repeat_command(run.experiment)) else []
    commands += [command(c) for c in dict.fromkeys(m.command for m in run.measures if m.command)]
    if not commands:
        commands = [el("p", "No command was recorded: the run was started from a program.", class_="missing")]
    versions: dict[str, str] = dict(run.experiment.get("versions", {}))
    rows: list[list[Child]] = [[name, value] for name, value in versions.items()]
    sheets = [("Configuration", run.experiment.get("experiment")), ("Model", dict(run.model))]
    details: list[Child] = [
        el(
            "details",
            el("summary", title),
            el("pre", el("code", json.dumps(content, indent=2, ensure_ascii=False))),
        )
        for title, content in sheets
        if content
    ]
    if rows:
        shown = table(["component", "version"], rows, "Versions that trained the model.")
        details.append(el("details", el("summary", "Versions"), shown))
    absent = missing(run.missing["experiment"]) if "experiment" in run.missing else None
    return card("How to repeat it", absent, *commands, *details)
