"""`imagewright bench decoding`: how training and decoding grow with an image's tokens; what each way to draw costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from imagewright.bench.decoding import MANY, Decoder, measure_decoders
from imagewright.bench.growth import Growth, exponents, measure_growth
from imagewright.cli.console import OUT, say, table
from imagewright.files import write_json
from imagewright.training.distributed import pick_device
from imagewright.types import UserError
from imagewright.version import versions

Part = Literal["growth", "ways"]


def decoding(
    tokens: tuple[int, ...] = (256, 1024),
    width: int = 64,
    only: Part | None = None,
    device: str = "auto",
    out: Path | None = None,
) -> None:
    """What a training step and a drawn image cost, by dense attention and by four papers' that see less; and what an
    image costs of causal models, MaskGIT, MD4 and ARPG, all of four blocks of 128.

    Args:
        tokens: of an image, two powers of 4 or more.
        width: of the networks whose growth is measured.
        only: growth (of the five attentions) or ways (to draw); without, both.
        device: auto, cpu, cuda, mps.
        out: also write the figures as JSON.
    """
    if len(set(tokens)) < 2 or any(n < 16 or 4 ** (n.bit_length() // 2) != n for n in tokens):
        raise UserError(f"--tokens is {' '.join(map(str, tokens))}; it must be two powers of 4 from 16 on, or more")
    if width < 4 or width % 4:
        raise UserError(f"--width is {width}; it must be a multiple of 4")
    target, counts = pick_device(device), sorted(tokens)
    command = f"imagewright bench decoding --tokens {' '.join(map(str, tokens))} --width {width} --device {device}"
    record: dict[str, Any] = {
        "format": "imagewright-growth/1",
        "command": command + ("" if only is None else f" --only {only}"),
        "device": str(target),
        "versions": versions(),
    }
    if only != "ways":
        found = measure_growth(target, counts, width, _say)
        fitted = exponents(found)
        _show_growth(found, fitted)
        record |= {"results": [each.as_dict() for each in found], "exponents": fitted}
    if only != "growth":
        ways = [each for count in counts for each in measure_decoders(target, count, on_start=_say)]
        _show_ways(ways)
        record["decoders"] = [each.as_dict() for each in ways]
    if out is not None:
        write_json(out, record)
        say(f"written to {out}")


def _say(what: str) -> None:
    say(f"measuring {what}")


def _show_growth(found: Sequence[Growth], fitted: dict[str, dict[str, float]]) -> None:
    rows = table("network", "tokens", "GFLOP", "MiB kept", "step (s)", "drawn (s)", "without cache", "ratio")
    for each in found:
        rows.add_row(
            each.network, str(each.tokens), f"{each.operations / 1e9:.3g}", f"{each.kept / 2**20:.3g}",
            f"{each.step:.3g}", f"{each.cached:.3g}", f"{each.uncached:.3g}", f"{each.uncached / each.cached:.1f}",
        )  # fmt: skip
    OUT.print(rows)
    powers = table("grows as n to the", "operations", "kept", "step", "drawn", "without cache")
    for name, costs in fitted.items():
        powers.add_row(name, *(f"{value:.2f}" for value in costs.values()))
    OUT.print(powers)


def _show_ways(ways: Sequence[Decoder]) -> None:
    drawing = table("drawing", "tokens", "passes", "seconds", f"each of {MANY}", "MiB")
    for way in ways:
        times = (f"{way.seconds:.3g}", f"{way.together:.3g}")
        drawing.add_row(way.name, str(way.tokens), str(way.passes), *times, f"{way.memory / 2**20:.3g}")
    OUT.print(drawing)
