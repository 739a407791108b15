"""The page: one self-contained HTML document about one run, or about several side by side.

Contract  no script, no request (a content-security policy in the page tells the browser), images as data:
          URIs; equal inputs give equal bytes, the date being one of the inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from imagewright.files import write_text
from imagewright.report.collect import Measure, RunSection
from imagewright.report.figures import Curve, loss_curves, overlaid_losses
from imagewright.report.likelihood import likelihood_card
from imagewright.report.markup import Child, Html, card, count, el, join, number, picture, table
from imagewright.report.section import quality_cards, run_section, shown_measure, strips
from imagewright.types import UserError
from imagewright.version import __version__

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CSS = Path(__file__).with_name("page.css")


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """What a page is made from. title: None = the names of the runs. made_on: ISO date; None = today."""

    runs: Sequence[RunSection]
    title: str | None = None
    made_on: str | None = None


def write_report(path: Path, runs: Sequence[RunSection], *, title: str | None = None) -> None:
    """Write the page about the runs, atomically. Raises UserError when there are none."""
    write_text(path, build_report(ReportInputs(runs=runs, title=title)))


def build_report(inputs: ReportInputs) -> str:
    """The whole HTML document. Raises UserError when there are no runs."""
    if not inputs.runs:
        raise UserError("a report needs at least one run")
    runs = _with_unique_names(inputs.runs)
    title = inputs.title or " · ".join(run.name for run in runs)
    day = inputs.made_on or date.today().isoformat()
    anchors = [f"run{i + 1}" for i in range(len(runs))]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{title} – imagewright report"),
        el("style", Html(CSS.read_text(encoding="utf-8"))),
    )
    main = el(
        "main",
        _comparison(runs) if len(runs) > 1 else None,
        *(run_section(run, anchor, _heading(run, runs)) for run, anchor in zip(runs, anchors, strict=True)),
    )
    header = el("header", el("p", f"imagewright report, {day}", class_="kicker"), el("h1", title), _nav(runs, anchors))
    footer = el("footer", f"Made by imagewright {__version__}. This file needs no other file and no network.")
    body = el("body", header, main, footer)
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _with_unique_names(runs: Sequence[RunSection]) -> list[RunSection]:
    """Runs whose folders have the same name are told apart by their paths."""
    times = Counter(run.name for run in runs)
    return [replace(run, name=str(run.folder)) if times[run.name] > 1 else run for run in runs]


def _heading(run: RunSection, runs: Sequence[RunSection]) -> str:
    """The run's name; a single run's name is the page's title already."""
    return run.name if len(runs) > 1 else f"{run.method} on {run.data.get('name', 'its data')}"


def _nav(runs: Sequence[RunSection], anchors: Sequence[str]) -> Html | None:
    if len(runs) < 2:
        return None
    names = ["Comparison", *(run.name for run in runs)]
    links = (el("li", el("a", n, href=f"#{a}")) for n, a in zip(names, ["comparison", *anchors], strict=True))
    return el("nav", el("ul", *links), aria_label="Runs")


# --- several runs -------------------------------------------------------------------------------------------


def _comparison(runs: Sequence[RunSection]) -> Html:
    return el(
        "section",
        el("h2", "Comparison", id="comparison-title"),
        card("Measures of what the pictures show", _comparison_table(runs), _comparability(runs)),
        likelihood_card([(run.name, run.likelihoods) for run in runs]),
        _same_noise(runs),
        el("div", *_losses(runs), class_="pair"),
        el(
            "div",
            *quality_cards([(run.name, run.measures) for run in runs], "comparison-quality"),
            class_="pair",
        ),
        id="comparison",
        aria_labelledby="comparison-title",
    )


def _losses(runs: Sequence[RunSection]) -> list[Html]:
    """A figure for each part that several runs trained: its loss over all noise levels in each of them."""
    whole: dict[str, list[Curve]] = {}
    for run in runs:
        for part, curves in loss_curves(run.log).items():
            whole.setdefault(part, []).append(replace(curves[0], label=run.name))
    return [
        card(f"Loss of the {part}", el("figure", overlaid_losses(part, curves, f"comparison-loss{i}")))
        for i, (part, curves) in enumerate(whole.items())
        if len(curves) > 1
    ]


_SCORES = ("precision", "recall", "density", "coverage")


def _comparison_table(runs: Sequence[RunSection]) -> Html:
    chosen = [shown_measure(run) for run in runs]
    names = {m.distance[0] for m in chosen if m is not None and m.distance is not None}
    one_name = names.pop() if len(names) == 1 else None
    lowest = min((m.distance[1] for m in chosen if m is not None and m.distance is not None), default=None)
    rows = [_comparison_row(run, m, one_name, lowest) for run, m in zip(runs, chosen, strict=True)]
    head = ["run and method", "NFE", one_name or "distance", *_SCORES, "seconds", "images/s", "GiB", "parameters"]
    absent = "" if all(chosen) else " A dash: not measured at that number of calls; see the run's own part below."
    return table(
        head,
        rows,
        "Distances: lower is better; precision to coverage: higher is better. Seconds and memory (a GPU's, or the "
        f"process's) are of drawing the images.{absent}",
    )


def _comparison_row(
    run: RunSection, measure: Measure | None, one_name: str | None, lowest: float | None
) -> list[Child]:
    title = join(run.name, el("br"), el("span", run.method, class_="quiet"))
    parameters = "–" if run.parameters is None else count(run.parameters)
    if measure is None or measure.distance is None:
        nfe = "–" if run.sampler_nfe is None else str(run.sampler_nfe)
        return [title, nfe, "–", *("–" for _ in _SCORES), "–", "–", "–", parameters]
    name, value = measure.distance
    text = number(value) if one_name else f"{number(value)} ({name})"
    scores = (number(measure.report["scores"].get(score)) for score in _SCORES)
    marked: Child = el("strong", text) if one_name and value == lowest else text
    return [
        title,
        str(measure.nfe),
        marked,
        *scores,
        number(measure.seconds or None),
        number(measure.images_per_second),
        number(None if measure.peak_bytes is None else measure.peak_bytes / 2**30),
        parameters,
    ]


def _comparability(runs: Sequence[RunSection]) -> Html | None:
    """A warning where the scores do not depend on the same things."""
    what = {
        "num_images": "numbers of images",
        "extractor_sha256": "feature extractors",
        "reference": "real images",
    }
    reports = [m.report for run in runs if (m := shown_measure(run)) is not None]
    different = [words for key, words in what.items() if len({str(r.get(key)) for r in reports}) > 1]
    if not different:
        return None
    return el(
        "p",
        f"These scores do not compare: they are of different {' and '.join(different)}.",
        class_="warning",
    )


def _same_noise(runs: Sequence[RunSection]) -> Html | None:
    drawn = [run for run in runs if run.first_images is not None]
    if len(drawn) < 2:
        return None
    if len({(str(r.data), r.seed) for r in drawn}) > 1:
        text = "The models are of different data, so their images do not start from the same noise and classes."
        return card("The same noise", el("p", text))
    rows = []
    for run in drawn:
        assert run.first_images is not None
        name = join(run.name, el("br"), el("span", f"{run.sampler_nfe} NFE", class_="quiet"))
        n = len(run.first_images)
        alt = f"{n} samples of {run.name} from the common noise"
        rows.append((name, picture(run.first_images, n, alt, side=96)))
    labels = drawn[0].first_labels
    classes = f" Classes, left to right: {', '.join(labels)}." if labels else ""
    caption = f"Images 0 to 9 of seed {drawn[0].seed}: equal noise and equal class in each column.{classes}"
    return card("The same noise", strips(("run", "samples"), rows, caption))
