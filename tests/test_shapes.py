"""What is read is held against a shape: every right value passes, every wrong one is named with its place."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from imagewright.files import open_regular, parse_json, read_json, replacing, try_output
from imagewright.limits import Room
from imagewright.shapes import Within, misfit
from imagewright.types import UserError


class Inner(TypedDict):
    n: Annotated[int, Within(1, 9)]
    kind: Literal["a", "b"]
    more: NotRequired[list[float] | None]


class Outer(TypedDict):
    inner: Inner
    pairs: list[tuple[str, int]]
    names: dict[str, str]


RIGHT: dict[str, Any] = {"inner": {"n": 9, "kind": "a", "more": [1, 0.5]}, "pairs": [["x", 1]], "names": {"k": "v"}}


def test_what_fits() -> None:
    assert misfit(RIGHT, Outer) is None
    assert misfit(RIGHT | {"of later versions": object()}, Outer) is None
    for value, shape in ((1, float), (None, int | None), ([1, 2], tuple[int, ...]), ("inf", float | str), (3, Any)):
        assert misfit(value, shape) is None, (value, shape)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("inner.n", 0, "inner.n is 0; it must be from 1 to 9"),
        ("inner.n", True, "inner.n is true; it must be a whole number"),
        ("inner.n", 2**70, "inner.n is a number of over 64 bits; it must be smaller"),
        ("inner.n", 1.0, "inner.n is 1.0; it must be a whole number"),
        ("inner.kind", "c", "inner.kind is 'c'; it must be one of a, b"),
        ("inner.kind", [[]], "inner.kind is a list of 1; it must be one of a, b"),
        ("inner.more", [None], "inner.more.0 is null; it must be a number"),
        ("inner.more", [float("nan")], "inner.more.0 is nan; it must be finite"),
        ("inner", None, "inner is null; it must be an object"),
        ("pairs", [["x", 1, 2]], "pairs.0 is a list of 3; it must be a list of 2"),
        ("pairs", {}, "pairs is an object of 0; it must be a list"),
        ("names", {"k": 1}, "names.k is 1; it must be a text"),
    ],
)
def test_what_does_not(path: str, value: Any, words: str) -> None:
    *parents, last = path.split(".")
    wrong = {**RIGHT, "inner": dict(RIGHT["inner"])}
    (wrong[parents[0]] if parents else wrong)[last] = value
    assert misfit(wrong, Outer) == words


def test_a_missing_entry() -> None:
    assert misfit({"inner": RIGHT["inner"], "pairs": []}, Outer) == "it lacks the entry 'names'"


@pytest.mark.parametrize(
    "text", ["NaN", "-Infinity", "1e999", "[" * 10_000, '{"a":' * 40 + "1" + "}" * 40, "9" * 5000, "{"]
)
def test_json_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match=r"^here is not readable as JSON: "):
        parse_json(text, "here")


def test_only_regular_files_are_read_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
        Path("device").symlink_to("/dev/zero")
        Path("whole").write_text("{}")
        Path("link").symlink_to("whole")
        Path("broken").symlink_to("nowhere")
        assert read_json(Path("link")) == {}
        for name, kind in (("fifo", "FIFO"), ("socket", "socket"), ("device", "device"), (".", "folder")):
            with pytest.raises(UserError, match=f"is a {kind}, not a file"):
                open_regular(Path(name))
        for name in ("fifo", "socket", "device", "link", "broken"):
            for write in (try_output, lambda p: replacing(p).__enter__()):
                with pytest.raises(UserError, match="never replaced"):
                    write(Path(name))
    assert Path("link").is_symlink()


def test_room_is_never_more_than_there_is() -> None:
    room = Room(10)
    with room.take(6), room.take(4):
        pass
    with room.take(50):  # more than there is, alone
        pass
