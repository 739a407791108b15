"""The page of `imagewright play`, built with NiceGUI (an extra): controls, and what a `Player` makes of them.

NiceGUI serves its own scripts, styles and fonts and measures nothing. A policy that goes with every answer forbids the
browser to ask any other server.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from imagewright.cli.playing import CELLS, MOST, Player, View
from imagewright.training.snapshots import grid
from imagewright.types import UserError

T = TypeVar("T")
Images = npt.NDArray[np.uint8]
SIDE = 112
"""Least side of a picture on the page, in CSS pixels."""
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; base-uri 'self'"
LOCAL = ("127.0.0.1", "localhost", "::1")
STYLE = """
.controls {display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .6rem; width: 100%}
.models {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 1rem; width: 100%}
h2 {font-size: 1.1rem; font-weight: 600; line-height: 1.4; margin: 0; overflow-wrap: anywhere}
.shots {display: flex; flex-wrap: wrap; gap: .4rem}
.shots button {padding: 0; border: 2px solid transparent; background: none; cursor: pointer; color: inherit}
.shots button:focus-visible, .shots button[aria-pressed=true] {border-color: var(--q-primary)}
.shots figure {margin: 0} .shots figcaption {font-size: .8rem; text-align: center}
img {image-rendering: pixelated; display: block} .strip {overflow-x: auto; max-width: 100%}
.net {display: grid; grid-template-columns: repeat(8, 28px); grid-auto-rows: 28px; position: relative;
  touch-action: none; user-select: none}
.net > div {position: absolute; inset: 0}
.net button {position: relative; border: 1px solid #8883; min-width: 0}
.net button[aria-pressed=true] {background: #e0f8}
.told {margin: .2rem 0; font-size: .9rem}
"""


class Guarded:
    """An application whose every answer carries the policy."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, sending)


def serve(player: Player, host: str, port: int) -> None:
    """Serve the page until the process is told to end."""
    from nicegui import app, ui
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app.add_middleware(Guarded)
    if host in LOCAL:  # a page elsewhere whose name was made to mean this machine is none of ours
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL, "[::1]"])
    ui.page("/")(lambda: Page(player).build())
    own = {"reload": False, "show": False, "show_welcome_message": False}
    ui.run(host=host, port=port, title="imagewright play", dark=None, tailwind=False, **own)


class Page:
    """One visitor's page: its controls hold a view."""

    def __init__(self, player: Player) -> None:
        from nicegui import ui

        self.ui, self.player = ui, player
        self.controls: dict[str, Any] = {}
        self.asked, self.wanted = 0, View()

    def build(self) -> None:
        """The controls as the address has them, and soon what they ask for."""
        ui = self.ui
        ui.add_css(STYLE)
        query = str(ui.context.client.request.url.query)
        try:
            view, fault = View.of_query(query), ""
        except UserError as error:
            view, fault = View(), str(error)
        ui.html("<h1 style='font-size:1.4rem;margin:0;line-height:1.5'>imagewright play</h1>", sanitize=False)
        with ui.element("div").classes("controls"):
            self._controls(view)
        with ui.row():
            ui.button("Draw", on_click=self.draw)
            ui.button("Next seed", on_click=self._next_seed)
            self.link = ui.link("Link to this view", "/").style("align-self: center")
        self.told = ui.html("", sanitize=False).props("role=status aria-live=polite")
        self.results = ui.element("div").classes("models")
        self.details = ui.element("section").props('aria-label="the chosen picture"').style("width: 100%")
        if fault:
            self.told.set_content(_told(fault))
        else:
            ui.timer(0, self.draw, once=True)

    def _controls(self, view: View) -> None:
        ui, own = self.ui, "the model's own"
        classes = {None: "drawn for each", -1: "none"} | dict(enumerate(self.player.classes()))
        samplers: dict[str | None, str] = {None: own} | {name: name for name in self.player.samplers()}
        samplers.setdefault(view.sampler, str(view.sampler))  # a link's, which no model here may know
        made: dict[str, Any] = {
            "seed": ui.number("Seed", value=view.seed, min=0, precision=0),
            "n": ui.number("Pictures", value=view.n, min=1, max=MOST, precision=0),
            "sampler": ui.select(samplers, label="Sampler", value=view.sampler),
            "steps": ui.number("Steps", value=view.steps, min=1, precision=0, placeholder=own),
            "settings": ui.input("Sampler settings", value=view.settings, placeholder="S_churn=10"),
            "weight": ui.number("Guidance weight", value=view.weight, step=0.25, placeholder="none"),
            "low": ui.number("Guide from noise", value=view.low, min=0, placeholder="0"),
            "high": ui.number("Guide up to noise", value=view.high, min=0, placeholder="all"),
            "towards": ui.number("Interpolate to seed", value=view.towards, min=0, precision=0, placeholder="none"),
        }
        if len(classes) > 2:
            classes.setdefault(view.label, str(view.label))
            made["label"] = ui.select(classes, label="Class", value=view.label, with_input=len(classes) > 12)
        for name, control in made.items():
            control.props(f"debounce=500 data-control={name} stack-label")
            control.on_value_change(self._changed)
        self.controls = made

    def view(self) -> View:
        """What the controls say. Raises UserError where a number is out of its bounds."""
        found: dict[str, Any] = {}
        for field in fields(View):
            value = self.controls[field.name].value if field.name in self.controls else None
            if value is None or value == "":
                continue
            found[field.name] = int(value) if isinstance(value, float) and "int" in str(field.type) else value
        return View(**found)

    def _next_seed(self) -> None:
        self.controls["seed"].value = int(self.controls["seed"].value or 0) + 1

    async def _changed(self) -> None:
        """Draw what the controls say, unless it is what they said before."""
        try:
            same = self.asked and self.view() == self.wanted
        except UserError:
            same = False
        if not same:
            await self.draw()

    async def draw(self) -> None:
        """All models' pictures of the controls' view; what was asked for before and is not yet drawn is left out."""
        self.asked += 1
        asked = self.asked
        try:
            view = self.wanted = self.view()
        except UserError as error:
            self.told.set_content(_told(str(error)))
            return
        self.told.set_content(_told("drawing ..."))
        self.link.props(f'href="/?{view.query}"')
        self.ui.run_javascript(f"history.replaceState(null, '', '/?{view.query}')")
        cards: list[tuple[str, Any, Any]] = []
        for name in self.player.files:
            drawn = await self._tried(partial(self.player.draw, name, view))
            way = None if view.towards is None else await self._tried(partial(self.player.between, name, view))
            if asked != self.asked:
                return
            cards.append((name, drawn, way))
        self.told.set_content("")
        self.details.clear()
        self.results.clear()
        with self.results:
            for name, drawn, way in cards:
                with self.ui.element("article").classes("model"):
                    self._card(name, view, drawn, way)

    async def _tried(self, work: Callable[[], T]) -> T | str:
        """The work's result, made in another thread; or why there is none."""
        from nicegui import run

        try:
            made: T = await run.io_bound(work)
        except UserError as error:
            return str(error)
        return made

    def _card(self, name: str, view: View, drawn: Any, way: Any) -> None:
        from imagewright.report.figures import sampler_words  # with matplotlib, which takes a while

        ui = self.ui
        ui.html(f"<h2>{html.escape(name)}</h2>", sanitize=False)
        if isinstance(drawn, str):
            ui.html(_told(drawn, "alert"), sanitize=False)
            return
        each = drawn.seconds / len(drawn.images)
        calls = f"{drawn.nfe} network call{'s' if drawn.nfe != 1 else ''} a picture"
        ui.html(_told(f"{calls}, {1000 * each:.3g} ms a picture; {sampler_words(drawn.sampler)}"), sanitize=False)
        with ui.element("div").classes("shots"):
            for i, image in enumerate(drawn.images):
                label = drawn.labels[i] if drawn.labels else ""
                alt = f"picture {i} of seed {view.seed}{f', class {label}' if label else ''}; look closer"
                button = ui.element("button").props('type="button"')
                button.on("click", partial(self._look, name, view, i, image))
                with button:
                    ui.html(_figure(image, alt, label), sanitize=False)
        if isinstance(way, str):
            ui.html(_told(way, "alert"), sanitize=False)
        elif way is not None:
            ui.html(_told(f"from seed {view.seed} to seed {view.towards}"), sanitize=False)
            ui.html(_strip(grid(way, len(way)), "the pictures between two seeds"), sanitize=False)

    async def _look(self, name: str, view: View, i: int, image: Images) -> None:
        """Picture i's way from noise, and its nearest training pictures."""
        way = await self._tried(partial(self.player.way, name, view, i))
        near = await self._tried(partial(self.player.near, name, image))
        self.details.clear()
        with self.details:
            self.ui.html(f"<h2>{html.escape(name)}, picture {i}</h2>", sanitize=False)
            self._shown(way, lambda found: _strip(found, "the picture's way from noise, left to right"))
            self._shown(near, _near)
            self._editor(name, view, i, image)

    def _editor(self, name: str, view: View, i: int, image: Images) -> None:
        """The picture under a net of cells; those that are drawn over, or chosen by keys, are filled in."""
        ui = self.ui
        try:
            self.player.check_fill(name)
        except UserError as error:
            ui.html(_told(str(error)), sanitize=False)
            return
        ui.html(_told("draw over what is to be filled in"), sanitize=False)
        cells: set[tuple[int, int]] = set()

        def mark(cell: tuple[int, int], button: Any, toggle: bool = False) -> None:
            (cells.discard if toggle and cell in cells else cells.add)(cell)
            button.props(f"aria-pressed={'true' if cell in cells else 'false'}")

        with ui.element("div").classes("shots"):
            with ui.element("div").classes("net"):
                ui.html(_img(image, "", 2 * SIDE), sanitize=False)
                for cell in np.ndindex(CELLS, CELLS):
                    words = f'type=button aria-pressed=false aria-label="row {cell[0]}, column {cell[1]}"'
                    button = ui.element("button").props(words)
                    for event in ("pointerdown", "pointerenter"):
                        button.on(event, partial(mark, cell, button), js_handler="e => { if (e.buttons) emit() }")
                    by_key = "e => { if (!e.detail) emit() }"
                    button.on("click", partial(mark, cell, button, True), js_handler=by_key)
            result = ui.html("", sanitize=False).props("aria-live=polite")

        async def fill() -> None:
            made = await self._tried(partial(self.player.fill, name, view, i, image, frozenset(cells)))
            alt = f"picture {i}, filled in"
            result.set_content(_told(made, "alert") if isinstance(made, str) else _img(made, alt, 2 * SIDE))

        ui.button("Fill in", on_click=fill)

    def _shown(self, found: Any, make: Callable[[Any], str]) -> None:
        text = _told(found, "alert") if isinstance(found, str) else make(found)
        self.ui.html(text, sanitize=False)


def _near(near: Any) -> str:
    figures = (
        _figure(image, f"training picture {index}", f"{distance:.3g}")
        for image, index, distance in zip(near.images, near.indices, near.distances, strict=True)
    )
    told = _told(f"nearest of {near.of:,} training pictures, with their distances in pixels")
    return f"{told}<div class=shots>{''.join(figures)}</div>"


def _told(text: str, role: str = "") -> str:
    return f"<p class=told{f' role={role}' if role else ''}>{html.escape(text)}</p>"


def _figure(image: Images, alt: str, caption: str) -> str:
    side = max(SIDE, image.shape[0]) if image.shape[0] > SIDE else SIDE // image.shape[0] * image.shape[0]
    return f"<figure>{_img(image, alt, side)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _strip(picture: Images, alt: str) -> str:
    scale = -(-64 // picture.shape[0])
    return f"<div class=strip tabindex=0>{_img(picture, alt, picture.shape[1] * scale)}</div>"


def _img(image: Images, alt: str, width: int) -> str:
    """A picture [H, W, C] in the page itself, on pixels of its own."""
    content = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(content, format="PNG")
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" width={width}>'
