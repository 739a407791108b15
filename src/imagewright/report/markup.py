"""HTML in pieces: `el("td", "a < b", class_="score")`; every text is escaped, only `Html` passes as it is."""

from __future__ import annotations

import base64
import html
import io
import shlex
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

Images = npt.NDArray[np.uint8]

GAP = 6
"""Pixels between the images of a sheet."""

_VOID = frozenset({"br", "col", "hr", "img", "input", "meta"})


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | Html | None


def el(name: str, /, *children: Child, **attributes: str | int | None) -> Html:
    """One element. In attribute names a last underscore is cut, others become dashes; None is left out."""
    pairs = ((k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items() if v is not None)
    start = name + "".join(f' {k}="{html.escape(str(v))}"' for k, v in pairs)
    return Html(f"<{start}>" if name in _VOID else f"<{start}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Children one after another; None is left out."""
    return Html("".join(c if isinstance(c, Html) else html.escape(c) for c in children if c is not None))


def card(title: str, *children: Child) -> Html:
    """A titled block."""
    return el("div", el("h3", title), *children, class_="card")


def picture(images: Images, columns: int, alt: str, *, side: int) -> Html:
    """An <img> of uint8 [N, H, W, C], C = 1 or 3, row by row; every image is enlarged to about `side` pixels.

    Pixels become whole squares, and the gaps are transparent, so that the sheet stands on light and on dark.
    """
    n, height, width, channels = images.shape
    scale = max(1, side // width)
    opaque = np.full((n, height, width, 1), 255, dtype=np.uint8)
    large = np.concatenate([images, opaque], axis=3).repeat(scale, 1).repeat(scale, 2)
    padded = np.pad(large, ((0, -n % columns), (0, GAP), (0, GAP), (0, 0)))
    rows = padded.reshape(-1, columns, *padded.shape[1:]).swapaxes(1, 2)
    sheet = rows.reshape(-1, columns * padded.shape[2], channels + 1)[:-GAP, :-GAP]
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="PNG", optimize=True)
    return png(buffer.getvalue(), alt, width=sheet.shape[1], height=sheet.shape[0])


def png(data: bytes, alt: str, **attributes: str | int | None) -> Html:
    """An <img> that carries a PNG file's bytes."""
    source = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    return el("img", src=source, alt=alt, **attributes)


def enlargeable(what: Html, label: str, anchor: str) -> Html:
    """Something that scrolls sideways by itself and fills the window at a click, or the space bar, on its corner.

    anchor: an id of its own. No script: a checkbox that the style hides.
    """
    box = el("input", type="checkbox", id=anchor, aria_label=f"enlarge: {label}")
    corner = el("label", for_=anchor, title="enlarge, or put back")
    return el("div", box, corner, el("div", what, class_="scroll"), class_="zoom")


def table(head: Sequence[Child], rows: Iterable[Sequence[Child]], caption: Child, class_: str = "numbers") -> Html:
    """A table whose first row and first column are headers, in a region that scrolls sideways by itself.

    Raises ValueError for a row of another length than the head.
    """
    rows = [list(row) for row in rows]
    if any(len(row) != len(head) for row in rows):
        raise ValueError(f"a table of {len(head)} columns has rows of {sorted({len(row) for row in rows})}")
    top = el("tr", *(el("th", cell, scope="col") for cell in head))
    body = (el("tr", el("th", first, scope="row"), *(el("td", cell) for cell in rest)) for first, *rest in rows)
    whole = el("table", el("caption", el("span", caption)), el("thead", top), el("tbody", *body), class_=class_)
    return el("div", whole, class_="scroll", tabindex=0, role="region", aria_label="table, scrolls sideways")


def command(words: Sequence[str]) -> Html:
    """A command line of the program, quoted for a shell."""
    line = words if words and words[0] == "imagewright" else ["imagewright", *words]
    return el("code", shlex.join(line), class_="command")


def number(value: float | None, digits: int = 3) -> str:
    """A number in a table, of that many significant digits; a dash where there is none."""
    if value is None:
        return "–"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".") if value else "0"


def count(value: float) -> str:
    """A large number in short: 1.5 M, 20 k, 412."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
