"""How a command is parsed: a typed function becomes its options; numbers and outputs are checked before any work.

The numbers of all commands are bounded in one table; a test holds it against every command's options. Settings that
are dataclasses check themselves when they are made.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import tyro

from imagewright.checks import require_number, require_whole
from imagewright.cli.console import ERR, OUT, say, shown
from imagewright.files import try_output
from imagewright.types import UserError

MANY = 10**9
BOUNDS: Mapping[str, tuple[float, float]] = {
    # how many
    **dict.fromkeys(("n", "batch_size", "batch", "steps", "shard", "images", "samples", "budget"), (1, MANY)),
    **dict.fromkeys(("evaluations", "iterations", "population", "points", "generations"), (1, MANY)),
    **dict.fromkeys(("until", "window", "spacing"), (1, MANY)),
    **dict.fromkeys(("max_layers", "updates"), (0, MANY)),
    "bits": (2, 8),
    "activations": (0, 8),
    "buckets": (1, 1000),
    "rounds": (3, MANY),
    "nfe": (0, MANY),
    # which
    **dict.fromkeys(("seed", "seeds", "first"), (0, 2**63 - 1)),
    "index": (0, MANY),
    "label": (-1, MANY),
    # sizes and strengths
    **dict.fromkeys(("resolution", "size", "workers", "tokens", "width"), (1, MANY)),
    "channels": (1, 3),
    "factor": (2, MANY),
    "order": (1, 2),
    "port": (1, 65535),
    **dict.fromkeys(("times", "holdout"), (math.ulp(0), 1)),
    "strengths": (2, MANY),
    **dict.fromkeys(("gammas", "tail", "unigrams"), (0, 1)),
    "t": (1, MANY),
    "pmi": (-math.inf, math.inf),
    **dict.fromkeys(("factors", "omega", "weight"), (-math.inf, math.inf)),
    **dict.fromkeys(("sigma", "levels", "std", "pollution", "at_most", "shift", "rate"), (math.ulp(0), math.inf)),
    **dict.fromkeys(("alphas", "betas"), (math.ulp(0), math.inf)),
}
"""Least and most of every number that a command takes, by the option's name; infinity itself is never allowed."""


_invoked: list[str] = []


def run(function: Callable[..., Any], args: Sequence[str], prog: str, epilog: str = "") -> Any:
    """Parse `args` as the function's options, check the numbers, and call it. Exits with 2 on a mistake.

    epilog: what the help says after the function's own first lines. "None" is a text as any other: an option that is
    not wanted is left out.
    """
    _invoked[:] = [*prog.split(), *args]
    description = inspect.cleandoc(function.__doc__ or "").split("Args:")[0].rstrip()
    with plainly(args):
        call = tyro.cli(
            _deferred(checked(function)),
            args=args,
            prog=prog,
            description=f"{description}\n\n{epilog}".rstrip(),
            config=(tyro.conf.DisallowNone,),
        )
    return call()


@contextmanager
def plainly(args: Sequence[str]) -> Iterator[None]:
    """What the parser says of arguments that a terminal would obey is shown as all texts are, without colours."""
    if all(word.isprintable() for word in args):
        yield
        return
    said, complained = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(complained):
            yield
    finally:
        for text, console in ((said.getvalue(), OUT), (complained.getvalue(), ERR)):
            console.print(shown(text, console), markup=False, end="")


def _deferred(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function's call, to be made once the arguments are parsed."""

    @functools.wraps(function)
    def defer(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(function, *args, **kwargs)

    return defer


def invoked() -> list[str]:
    """The command that runs, word by word, for records of what it did; paths that are there in full."""
    return [os.path.abspath(word) if os.path.exists(word) else word for word in _invoked]


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its numbers and its `out` checked; its signature stays what it was."""

    @functools.wraps(function)
    def checking(*args: Any, **kwargs: Any) -> Any:
        for name, value in inspect.signature(function).bind(*args, **kwargs).arguments.items():
            check_numbers(name, value)
            if name == "out" and value is not None:
                try_output(value)
        return function(*args, **kwargs)

    return checking


def check_numbers(name: str, value: Any) -> None:
    """Raise UserError "--name is VALUE; ..." for a number, or one of several, out of its bounds.

    Of settings whose fields are options of the command, those that have bounds.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            if field.name in BOUNDS:
                check_numbers(field.name, getattr(value, field.name))
        return
    values = value if isinstance(value, tuple) else (value,)
    for each in values:
        if isinstance(each, bool) or not isinstance(each, (int, float)):
            continue
        least, most = BOUNDS[name]
        option = f"--{name.replace('_', '-')}"
        if isinstance(each, int):
            require_whole(option, each, int(max(least, -MANY)), int(min(most, 2**63 - 1)))
        else:
            require_number(option, each, least, most)


def dispatch(commands: Mapping[str, Callable[..., Any]], args: Sequence[str], prog: str, help_text: str) -> None:
    """Run the sub-command that the first word names; without a word, or with --help, say what there is."""
    if not args or args[0] in ("-h", "--help"):
        say(help_text)
        return
    if args[0] not in commands:
        near = difflib.get_close_matches(args[0], commands, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(commands)}"
        raise UserError(f"there is no `{prog} {args[0]}`; {hint}")
    run(commands[args[0]], args[1:], f"{prog} {args[0]}")


def options(function: Callable[..., Any], default: Any = None) -> dict[str, tuple[str, ...]]:
    """Every option of a command, as the parser knows them, and the words that may follow it ((): anything)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro offers no other way to ask what a parser knows
        given = {} if default is None else {"default": default}
        parser = tyro.extras.get_parser(function, config=(tyro.conf.AvoidSubcommands,), **given)
    found: dict[str, tuple[str, ...]] = {}
    for action in parser._actions:
        words = re.fullmatch(r"(?:\[?\{)([\w,.-]+)\}.*", str(action.metavar or ""))
        for option in action.option_strings:
            found[option] = tuple(w for w in words[1].split(",") if w != "None") if words else ()
    return found
