"""`imagewright play`: what it draws, compares, interpolates and finds; and its page in a real browser."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagewright.cli import play as command
from imagewright.cli.playing import FRAMES, Player, View
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.files import ModelFile, save_model
from imagewright.models.masked import MaskedTokenModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.tokens import PixelCodec
from imagewright.networks import SongUNet, SongUNetConfig, TokenTransformer, TokenTransformerConfig
from imagewright.samplers import Heun
from imagewright.samplers.generator import sampler_to_json
from imagewright.types import DataSpec, UserError

DIGITS = DataSpec(name="digits", resolution=8, channels=1, num_classes=10, class_names=tuple("0123456789"))
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 300
"""Seconds for anything that a busy machine does in one."""


def network(dropout: float = 0) -> SongUNet:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": ()}
    return SongUNet(
        SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, label_dim=10, label_dropout=dropout, **settings)
    )


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A denoiser that knows no label, too, and a consistency model of the same digits."""
    folder = tmp_path_factory.mktemp("models")
    teacher = ModelFile(model=EDMPrecond(network(0.1)), spec=DIGITS, sampler=sampler_to_json(Heun(num_steps=3)))
    save_model(folder / "teacher", teacher)
    save_model(folder / "student", ModelFile(model=ConsistencyModel(network()), spec=DIGITS))
    return str(folder / "teacher"), str(folder / "student")


@pytest.fixture(scope="module")
def player(names: tuple[str, str]) -> Player:
    return Player(names, "cpu")


def test_a_view_comes_back_from_its_link() -> None:
    view = View(seed=7, n=3, label=-1, sampler="heun", steps=5, settings="S_churn=10 rho=5", weight=1.5, high=0.3)
    assert View.of_query(view.query) == view
    assert View().query == "" and View.of_query("") == View()
    for query, complaint in (("sed=1", "'sed'"), ("seed=x", "'x'"), ("n=0", "n is 0"), ("weight=nan", "weight is nan"),
                             ("sampler=/etc/a.json", "no sampler"), ("steps=1001", "steps is 1001")):  # fmt: skip
        with pytest.raises(UserError, match=complaint):
            View.of_query(query)


def test_models_are_drawn_alike_and_their_calls_counted(player: Player, names: tuple[str, str]) -> None:
    teacher, student = (player.draw(name, View(seed=3, n=2)) for name in names)
    assert (teacher.nfe, student.nfe) == (5, 1)
    assert teacher.labels == student.labels and len(teacher.labels) == 2  # of the same draws
    assert teacher.images.shape == student.images.shape == (2, 8, 8, 1)
    assert teacher.seconds > 0 and teacher.sampler["class"] == "heun"
    more = player.draw(names[0], View(seed=3, n=3, steps=2, sampler="euler"))
    assert more.nfe == 2
    again = player.draw(names[0], View(seed=3, n=3))
    np.testing.assert_array_equal(again.images[:2], teacher.images)
    assert "heun" in player.samplers() and "masked-decoding" not in player.samplers()
    assert player.classes() == tuple("0123456789")


def test_guidance_is_taken_as_each_kind_takes_it(player: Player, names: tuple[str, str], tmp_path: Path) -> None:
    plain, guided = (player.draw(names[0], View(label=3, weight=weight)) for weight in (None, 2.0))
    assert (plain.nfe, guided.nfe) == (5, 10)
    assert player.draw(names[0], View(label=3, weight=2.0, high=0.01)).nfe < 10  # of few levels only
    for view in (View(weight=2.0), View(low=0.1), View(sampler="heun"), View(settings="nothing=1")):
        with pytest.raises(UserError):
            player.draw(names[1], view)
    worse = network(0.1)
    with torch.no_grad():
        for p in worse.parameters():
            p.add_(0.05 * torch.randn_like(p))
    save_model(tmp_path / "worse", ModelFile(model=EDMPrecond(worse), spec=DIGITS))
    led = Player(names, "cpu", guide=str(tmp_path / "worse"))
    away = led.draw(names[0], View(label=3, weight=2.0))
    assert away.nfe == 10 and not np.array_equal(away.images, guided.images)
    np.testing.assert_array_equal(led.draw(names[0], View(label=3)).images, plain.images)
    with pytest.raises(UserError, match=r"--guide .* has no effect: no model here is guided by another"):
        Player(names[1:], "cpu", guide=names[0])
    with pytest.raises(UserError, match="neither a folder"):
        Player(names, "cpu", guide="nothing")
    with pytest.raises(UserError, match="label 10"):
        player.draw(names[1], View(label=10))


@pytest.mark.parametrize("i", [0, 1])
def test_an_interpolation_goes_from_one_picture_to_the_other(player: Player, names: tuple[str, str], i: int) -> None:
    view = View(seed=1, towards=2, n=1, label=4)
    way = player.between(names[i], view)
    assert way.shape == (FRAMES, 8, 8, 1)
    np.testing.assert_array_equal(way[0], player.draw(names[i], view).images[0])
    np.testing.assert_array_equal(way[-1], player.draw(names[i], View(seed=2, n=1, label=4)).images[0])
    assert (way[FRAMES // 2] != way[0]).any()


def test_an_interpolation_needs_an_end_and_begins_at_a_noisy_sampler_s_picture(
    player: Player, names: tuple[str, str]
) -> None:
    with pytest.raises(UserError, match="second seed"):
        player.between(names[0], View())
    noisy = View(seed=1, towards=2, n=1, settings="S_churn=10")
    np.testing.assert_array_equal(player.between(names[0], noisy)[0], player.draw(names[0], noisy).images[0])


def test_the_way_of_one_picture_ends_in_it(player: Player, names: tuple[str, str]) -> None:
    view = View(seed=5, n=3)
    strip, image = player.way(names[0], view, 2), player.draw(names[0], view).images[2]
    last = strip[-9 * 8 : -8, -9 * 8 : -8].reshape(8, 8, 8, 8, 1)[:, 0, :, 0]  # 8 pixels a pixel, and a gap of one
    np.testing.assert_array_equal(last, image)


def test_the_nearest_of_a_training_picture_is_itself(player: Player, names: tuple[str, str]) -> None:
    real = player.near(names[0], player.draw(names[0], View()).images[0])
    assert list(real.distances) == sorted(real.distances) and real.distances[0] > 0
    found = player.near(names[0], real.images[3])
    assert (found.distances[0], found.indices[0]) == (0, real.indices[3])
    np.testing.assert_array_equal(found.images[0], real.images[3])


def test_a_part_is_filled_in_and_the_rest_stays(player: Player, names: tuple[str, str]) -> None:
    view = View(seed=5, n=2)
    image = player.draw(names[1], view).images[1]
    made = player.fill(names[1], view, 1, image, {(0, 0), (7, 3)})
    changed = np.argwhere((made != image)[..., 0])
    assert {*map(tuple, changed.tolist())} == {(0, 0), (7, 3)}
    with pytest.raises(UserError, match="choose what"):
        player.fill(names[1], view, 1, image, ())
    with pytest.raises(UserError, match="editing needs a flow map"):
        player.fill(names[0], view, 1, image, {(0, 0)})


def test_a_token_model_is_drawn_guided_and_filled_in(tmp_path: Path) -> None:
    config = TokenTransformerConfig(values=256, length=64, label_dim=10, width=8, depth=1, heads=1, dropout=0.0)
    model = MaskedTokenModel(TokenTransformer(config), PixelCodec(8, 1), label_dropout=0.1)
    save_model(tmp_path, ModelFile(model=model, spec=DIGITS))
    name, view = str(tmp_path), View(n=1, steps=3, towards=1)
    player = Player([name], "cpu")
    drawn = player.draw(name, view)
    assert drawn.nfe == 3 and "masked-decoding" in player.samplers() and "heun" not in player.samplers()
    assert player.draw(name, View(n=1, steps=3, weight=2.0)).nfe == 6
    made = player.fill(name, view, 0, drawn.images[0], {(1, 1)})
    assert np.argwhere(made != drawn.images[0])[:, :2].tolist() in ([], [[1, 1]])
    assert player.way(name, view, 0).shape[0] < 2 * 9 * 8  # one row: x and the estimate are the same
    with pytest.raises(UserError, match="no noise"):
        player.between(name, view)
    with pytest.raises(UserError, match="interval"):
        player.draw(name, View(weight=2.0, low=0.1))


def test_mistakes_are_told(names: tuple[str, str], refused: Callable[..., str], monkeypatch: Any) -> None:
    assert "at least one model" in refused("play")
    assert "--port is 0" in refused("play", names[0], "--port", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot listen" in refused("play", names[0], "--port", taken.getsockname()[1])
    assert "named twice" in refused("play", names[0], names[0])
    assert "neither" in refused("play", "nowhere")
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'imagewright[ui]'" in refused("play", names[0])


# --- in a browser -------------------------------------------------------------------------------------------


class Browser:
    """A Chromium, spoken to as its own developer tools do."""

    def __init__(self, program: str, profile: Path) -> None:
        from websockets.sync.client import connect

        quiet = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
        flags = ("headless=new", "no-sandbox", "disable-gpu", "remote-debugging-port=0", "window-size=390,800", *quiet)
        words = (program, *(f"--{flag}" for flag in flags), f"--user-data-dir={profile}", "about:blank")
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        told = next(line for line in self.process.stderr if "DevTools listening" in line)
        pages: list[dict[str, str]] = []
        while not pages:  # it listens before it has one
            with urllib.request.urlopen(f"http://{told.split('/')[2]}/json") as answer:
                pages = [tab for tab in json.load(answer) if tab["type"] == "page"]
        patient = {"open_timeout": None, "ping_interval": None, "close_timeout": PATIENCE}
        self.context = connect(pages[0]["webSocketDebuggerUrl"], max_size=None, **patient)
        self.socket, self.sent, self.heard = self.context.__enter__(), 0, list[dict[str, Any]]()
        for domain in ("Network", "Log", "Page", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=PATIENCE))
            if message.get("id") == self.sent:
                assert "error" not in message, message
                return dict(message["result"])
            self.heard.append(message)

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Its value, once there is one."""
        until = time.monotonic() + PATIENCE
        while not (found := self.value(expression)):
            assert time.monotonic() < until, (expression, self.value("document.body.innerText"))
            time.sleep(0.1)
        return found

    def close(self) -> None:
        self.context.__exit__(None, None, None)
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no Chromium on this machine (looked for {', '.join(BROWSERS)})")
    opened = Browser(program, tmp_path / "profile")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def address(names: tuple[str, str]) -> Iterator[str]:
    if importlib.util.find_spec("nicegui") is None:
        pytest.skip("the extra ui is not installed")
    held = socket.socket()  # bound, and listening to nobody: no other program is given the port, and the server may
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = held.getsockname()[1]
    words = (sys.executable, "-m", "imagewright", "play", *names, "--port", str(port), "--device", "cpu")
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}  # by which NiceGUI tests itself
    server = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url, until = f"http://127.0.0.1:{port}/", time.monotonic() + PATIENCE
    try:
        while True:
            try:
                urllib.request.urlopen(url).close()
                break
            except urllib.error.URLError:
                assert server.poll() is None, server.communicate()
                assert time.monotonic() < until
                time.sleep(0.1)
        yield url
        server.send_signal(signal.SIGINT)
        said, complained = server.communicate(timeout=PATIENCE)
    finally:
        server.kill()
        held.close()
    assert url in said and "Traceback" not in complained, complained
    assert server.returncode == 130


@pytest.mark.browser
def test_the_page_draws_compares_and_looks_closer(address: str, browser: Browser) -> None:
    browser.call("Page.navigate", url=f"{address}?seed=4&n=2&towards=9")
    shown = "[...document.querySelectorAll('.model .shots img')]"
    browser.wait(f"{shown}.length == 4 && {shown}.every(i => i.complete && i.naturalWidth == 8)")
    cards = browser.value("[...document.querySelectorAll('.model')].map(e => e.innerText)")
    assert "5 network calls a picture" in cards[0] and "1 network call a picture" in cards[1]
    assert all("from seed 4 to seed 9" in card and " ms a picture" in card for card in cards)
    assert browser.value("document.querySelectorAll('.model .strip img').length") == 2
    before = browser.value(f"{shown}.map(i => i.src)")

    browser.value("document.querySelector('.model .shots button').focus()")
    for kind in ("keyDown", "keyUp"):  # chosen by the keyboard alone
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
        )
    browser.wait("document.querySelectorAll('section .shots img').length == 5")
    assert "nearest of 1,629 training pictures" in browser.value("document.querySelector('section').innerText")
    browser.wait("document.querySelector('section .strip img').naturalWidth > 64")

    browser.value("document.querySelectorAll('.model:last-child .shots button')[1].click()")
    browser.wait("document.querySelectorAll('.net button').length == 64")
    browser.wait("[...document.images].every(i => i.complete) && document.fonts.status == 'loaded'")  # nothing moves
    browser.value("document.querySelector('.net').scrollIntoView({block: 'center'})")
    x, y, side = browser.value("(b => [b.x, b.y, b.width])(document.querySelector('.net').getBoundingClientRect())")
    for kind, column in (("mousePressed", 0), ("mouseMoved", 1), ("mouseMoved", 2), ("mouseReleased", 2)):
        at = {"x": x + (column + 0.5) * side / 8, "y": y + side / 16, "button": "left", "buttons": 1}
        browser.call("Input.dispatchMouseEvent", type=kind, clickCount=1, **at)
    browser.wait("document.querySelectorAll('.net button[aria-pressed=true]').length == 3")
    browser.value("[...document.querySelectorAll('button')].find(b => b.innerText.toLowerCase() == 'fill in').click()")
    browser.wait("document.querySelector('section img[alt$=\"filled in\"]')?.naturalWidth == 8")

    browser.value("document.querySelector('[data-control=seed]').focus()")
    browser.value("document.querySelector('[data-control=seed]').select()")
    browser.call("Input.insertText", text="5")
    browser.wait(f"location.search.includes('seed=5') && {shown}.length == 4 && {shown}[0].src != {before[0]!r}")
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")  # 390 pixels, a telephone's
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.value("window.before = true")
    browser.call("Page.reload")
    browser.wait(f"!window.before && {shown}.length == 4 && document.querySelector('[data-control=seed]').value == '5'")

    browser.wait("document.body.classList.contains('body--dark')")
    browser.wait("getComputedStyle(document.body).backgroundColor == 'rgb(18, 18, 18)'")
    browser.wait("getComputedStyle(document.querySelector('figcaption')).color == 'rgb(255, 255, 255)'")

    asked = [m["params"]["request"]["url"] for m in browser.heard if m["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith((address, "data:", "blob:")) for url in asked)
    assert not [m for m in browser.heard if m["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]


def test_no_other_name_and_no_other_server(address: str) -> None:
    with urllib.request.urlopen(address) as answer:
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    for url in (f"{address}?sed=1", f"{address}?seed=x"):  # told on the page, which is served
        urllib.request.urlopen(url).close()
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "elsewhere.example"}))
