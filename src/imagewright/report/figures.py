"""Figures of a page: curves as inline SVG in the page's light or dark colours, and sheets of images.

SVG     drawn by matplotlib without its global state; what is drawn in `INK` becomes the page's text colour
        and text stays text. Equal inputs give equal bytes.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter, NullLocator

from imagewright.report.collect import MOST_STEPS, TRAJECTORIES, Measure, Trajectory, draw_trajectory
from imagewright.report.markup import Html, enlargeable
from imagewright.samplers import SAMPLERS
from imagewright.samplers.generator import ImageGenerator, sampler_to_json
from imagewright.training.snapshots import grid

Images = npt.NDArray[np.uint8]

INK = "#0b0c0d"
COLOURS = ("#3b82f6", "#e07b00", "#12a07a", "#c2478d", "#8b6cf0", "#8a8f98")
"""Readable on white and on near-black, and apart for colour-blind eyes."""
MARKERS = "osD^vP"
SIZE = (4.6, 3.1)
"""Inches. On a phone the page shows a figure no smaller than its text can be read, and lets it scroll sideways."""
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "imagewright",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points (x, y) and what they are."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


# --- losses -------------------------------------------------------------------------------------------------


def loss_curves(log: Sequence[Mapping[str, float]]) -> dict[str, list[Curve]]:
    """For each trained part, its loss over images seen, and the loss in each bin of noise levels."""
    names = sorted({key for line in log for key in line if "/loss" in key})
    curves: dict[str, list[Curve]] = {}
    for name in sorted(names, key=_low_edge):
        part, _, kind = name.partition("/")
        points = [(line["images"], line[name]) for line in log if name in line and np.isfinite(line[name])]
        if points and (kind == "loss" or kind.startswith("loss_sigma_")):
            x, y = zip(*points, strict=True)
            curves.setdefault(part, []).append(Curve(label=_bin_words(kind), x=x, y=y))
    return {k: v if len(v) > 1 else [replace(v[0], label="loss")] for k, v in curves.items()}


def _low_edge(name: str) -> tuple[str, float]:
    part, _, kind = name.partition("/")
    found = re.fullmatch(r"loss_sigma_([\d.e+-]+)_to_.+", kind)
    return part, float(found[1]) if found else -1.0


def _bin_words(kind: str) -> str:
    """loss_sigma_0.5_to_2 -> 0.5 ≤ σ < 2."""
    low, _, high = kind.removeprefix("loss_sigma_").partition("_to_")
    if not high:
        return "all noise levels"
    return f"σ ≥ {low}" if high == "inf" else f"σ < {high}" if low == "0" else f"{low} ≤ σ < {high}"


def loss_figure(part: str, curves: Sequence[Curve], prefix: str) -> Html:
    """A part's losses over images seen; logarithmic unless a loss is not positive."""
    with mpl.rc_context(STYLE):
        figure, axes = _canvas("images seen", "loss")
        for i, curve in enumerate(curves):
            total = i == 0
            marker = "o" if len(curve.x) < 3 else None
            width = 2.0 if total else 1.2
            colour = INK if total else COLOURS[(i - 1) % len(COLOURS)]
            axes.plot(curve.x, curve.y, label=curve.label, color=colour, lw=width, marker=marker, ms=3)
        _finish_losses(axes, curves)
        axes.legend(loc="upper right")
        how = ", in all and by noise level" if len(curves) > 1 else ""
        return _svg(figure, f"Loss of the {part} over images seen{how}", prefix)


def overlaid_losses(part: str, curves: Sequence[Curve], prefix: str) -> Html:
    """A part's loss over images seen, one curve a run; logarithmic unless a loss is not positive."""
    with mpl.rc_context(STYLE):
        figure, axes = _canvas("images seen", "loss")
        for colour, curve in zip(cycle(COLOURS), curves, strict=False):
            marker = "o" if len(curve.x) < 3 else None
            axes.plot(curve.x, curve.y, label=f" {curve.label}", color=colour, lw=1.4, marker=marker, ms=3)
        _finish_losses(axes, curves)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1 if len(curves) < 3 else 2)
        return _svg(figure, f"Loss of the {part} over images seen, of each run", prefix)


def _finish_losses(axes: Axes, curves: Sequence[Curve]) -> None:
    if min(min(curve.y) for curve in curves) > 0:
        axes.set_yscale("log")
        _plain_log_ticks(axes)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def rate_curves(log: Sequence[Mapping[str, float]]) -> list[Curve]:
    """Each trained part's learning rate over images seen: the run's ramp, decay and cool-down as they were."""
    curves = []
    for name in sorted({key for line in log for key in line if key.endswith("/lr")}):
        x, y = zip(*((line["images"], line[name]) for line in log if name in line), strict=True)
        curves.append(Curve(label=name.removesuffix("/lr"), x=x, y=y))
    return curves


def rate_figure(curves: Sequence[Curve], prefix: str) -> Html:
    """Learning rates over images seen."""
    with mpl.rc_context(STYLE):
        figure, axes = _canvas("images seen", "learning rate")
        for colour, curve in zip(cycle(COLOURS), curves, strict=False):
            marker = "o" if len(curve.x) < 3 else None
            axes.plot(curve.x, curve.y, label=curve.label, color=colour, marker=marker, ms=3)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend(loc="upper right")
        return _svg(figure, "Learning rate of each part over images seen", prefix)


# --- quality against cost -----------------------------------------------------------------------------------


def quality_curves(named: Sequence[tuple[str, Sequence[Measure]]]) -> dict[str, list[Curve]]:
    """For each distance's name: curves over NFE, one for each run and kind of sampler."""
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, measures in named:
        for measure in measures:
            if measure.distance and measure.distance[1] > 0 and measure.nfe > 0:
                words = sampler_words({k: v for k, v in measure.sampler.items() if k not in ("num_steps", "sigmas")})
                label = f"{name}: {words}" if len(named) > 1 else words
                score, value = measure.distance
                points.setdefault(score, {}).setdefault(label, []).append((measure.nfe, value))
    return {
        score: [Curve(label=k, x=[x for x, _ in sorted(v)], y=[y for _, y in sorted(v)]) for k, v in lines.items()]
        for score, lines in points.items()
    }


def quality_figure(score: str, curves: Sequence[Curve], yardsticks: Mapping[str, float], prefix: str) -> Html:
    """A distance over network evaluations per image, both logarithmic; yardsticks are horizontal lines."""
    with mpl.rc_context(STYLE):
        figure, axes = _canvas("network evaluations per image (NFE)", f"{score} (lower is better)")
        styles = zip(cycle(COLOURS), cycle(MARKERS), curves, strict=False)
        for colour, marker, curve in styles:
            label = f" {curve.label}"  # matplotlib hides a label that starts with an underscore
            axes.plot(curve.x, curve.y, label=label, color=colour, marker=marker, ms=5, lw=1.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = sorted({int(x) for curve in curves for x in curve.x})
        axes.set_xlim(ticks[0] / 1.6, ticks[-1] * 1.6)
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        for name, value in yardsticks.items():
            if value > 0:
                axes.axhline(value, color=INK, lw=1, ls=(0, (4, 3)), alpha=0.55)
                where = (0.99, value)
                axes.annotate(
                    name,
                    where,
                    (0, 2),
                    ("axes fraction", "data"),
                    textcoords="offset points",
                    ha="right",
                    size=9,
                )
        axes.margins(y=0.12)
        _plain_log_ticks(axes)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1 if len(curves) < 3 else 2)
        return _svg(figure, f"{score} against network evaluations per image, with yardsticks", prefix)


def sampler_words(settings: Mapping[str, Any]) -> str:
    """A sampler in words: "heun, 18 steps, S_churn 40"; settings that have their usual value are left out."""
    name = str(settings.get("class", "images from files"))
    usual = sampler_to_json(SAMPLERS[name]()) if name in SAMPLERS else {}
    words = [name, *([f"{settings['num_steps']} steps"] if settings.get("num_steps") else [])]
    for key, value in settings.items():
        if key not in ("class", "num_steps") and _listed(value) != _listed(usual.get(key)):
            words.append(f"{key} {_listed(value)}")
    return ", ".join(words)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# --- pictures of many images --------------------------------------------------------------------------------


def trajectory_sheets(trajectory: Trajectory) -> list[Images]:
    """x, and the estimates of x0: images uint8 [n S, H, W, C] of sheets of S columns, a row for each of n images.

    A single jump makes one sheet of two columns, noise and image. Of tokens there is one sheet.
    """
    stacks = [trajectory.x, trajectory.estimate]
    if trajectory.tokens:
        stacks = stacks[1:]
    elif len(trajectory.sigmas) == 1:
        stacks = [np.concatenate(stacks)]
    return [stack.swapaxes(0, 1).reshape(-1, *stack.shape[2:]) for stack in stacks]


def trajectory_picture(
    generator: ImageGenerator,
    *,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    n: int = TRAJECTORIES,
    first: int = 0,
    most_steps: int = MOST_STEPS,
) -> Images:
    """The way of images of a seed, from the first on: x (clipped) above, the estimate of x0 below, uint8 [H', W', C].

    labels: classes of these images, more are ignored; None = drawn as `generate` does.
    n: images, at most `collect.TRAJECTORIES`. A single jump gives two columns.
    """
    n = n if labels is None else min(n, len(labels))
    classes = None if labels is None else np.asarray(labels[:n], dtype=np.int64)
    _, trajectory = draw_trajectory(generator, n, labels=classes, seed=seed, first=first)
    thin = trajectory.thinned(most_steps)
    sheets = [grid(images, len(images) // n) for images in trajectory_sheets(thin)]
    gap = np.full((max(4, generator.spec.resolution // 4), *sheets[0].shape[1:]), 255, dtype=np.uint8)
    whole = np.concatenate([part for sheet in sheets for part in (gap, sheet)][1:])
    scale = max(1, 64 // generator.spec.resolution)
    return whole.repeat(scale, 0).repeat(scale, 1)


# --- matplotlib without its global state --------------------------------------------------------------------


def _canvas(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def _plain_log_ticks(axes: Axes) -> None:
    """0.5, 1, 2, 5 instead of powers of ten, as losses rarely span two decades."""
    low, high = axes.get_ylim()
    near = high / low < 300
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(figure: Figure, label: str, prefix: str) -> Html:
    """The figure as an <svg> element whose ids start with `prefix`, so that several live in one page."""
    buffer = io.StringIO()
    unsaid = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=unsaid)
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :].strip()
    # Inside HTML the parser knows the namespaces; the size comes from the page's style.
    body = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", body).replace("xlink:href", "href")
    body = re.sub(r'( id="|url\(#| href="#)', rf"\g<1>{prefix}-", body).replace(INK, "currentColor")
    width, height = (72 * side for side in SIZE)
    start = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(label)}">'
    return enlargeable(Html(f"{start}{body}"), label, f"{prefix}-large")
