"""`imagewright play MODEL ...`: a page in the browser to draw with models and compare them."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import tyro

from imagewright.cli.command import run
from imagewright.cli.console import say
from imagewright.types import UserError

EPILOG = """examples:
  imagewright play emoji64-32
  imagewright play runs/edm-digits runs/cd-digits       # side by side, from the same noise
  imagewright play emoji64-32 --host 0.0.0.0 --port 80  # for every machine that reaches this one
"""


def play(
    models: Annotated[tuple[str, ...], tyro.conf.Positional],
    data: str | None = None,
    guide: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    device: str = "auto",
) -> None:
    """Serve a page on this machine that draws with one or several models, side by side from the same noise.

    It shows what the pictures cost, their way from noise, the pictures between two seeds, and a picture's nearest
    training pictures. Its address holds the whole view. It needs an extra, pip install 'imagewright[ui]', and asks no
    other server for anything.

    Args:
        models: run folders, model folders or shipped models.
        data: where nearest pictures are sought; default what each model was trained on.
        guide: what guidance leads denoisers away from, as in `sample --guidance auto`: a run that is smaller or less
            trained; default each model's own unlabelled answer.
        host: address to listen at; the default is reached from this machine alone.
        port: of the address.
        device: auto, cpu, cuda, mps.
    """
    if not models:
        raise UserError("imagewright play needs at least one model; a shipped one is emoji64-32")
    if importlib.util.find_spec("nicegui") is None:
        raise UserError("a page to play with is served with an extra: pip install 'imagewright[ui]'")
    from imagewright.cli.play_page import serve
    from imagewright.cli.playing import Player

    player = Player(models, device, data, guide)
    _require_free(host, port)
    say(f"open http://{f'[{host}]' if ':' in host else host}:{port}/ in a browser; Ctrl-C ends it")
    serve(player, host, port)


def _require_free(host: str, port: int) -> None:
    """Raise UserError where nothing can listen at the address."""
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind, socket.SOCK_STREAM) as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen at {host}, port {port}: {error.strerror}; choose --host and --port") from None


COMMANDS: Mapping[str, Callable[..., None]] = {"": play}


def main(args: Sequence[str]) -> None:
    """Parse and serve."""
    run(play, args, "imagewright play", EPILOG)
