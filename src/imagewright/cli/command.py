"""How a command is parsed: a typed function becomes its options, and every number is checked before any work.

The numbers of all commands are bounded in one table; a test holds it against every command's options. Settings that
are dataclasses check themselves when they are made.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro

from imagewright.checks import require_number, require_whole

MANY = 10**9
BOUNDS: Mapping[str, tuple[float, float]] = {
    # how many
    **dict.fromkeys(("n", "batch_size", "batch", "steps", "shard", "images", "samples", "budget"), (1, MANY)),
    **dict.fromkeys(("evaluations", "iterations", "population", "points", "generations"), (1, MANY)),
    "max_layers": (0, MANY),
    "rounds": (3, MANY),
    # which
    **dict.fromkeys(("seed", "seeds", "first"), (0, 2**63 - 1)),
    "index": (0, MANY),
    "label": (-1, MANY),
    # sizes and strengths
    "resolution": (1, MANY),
    "channels": (1, 3),
    "factor": (2, MANY),
    "order": (1, 2),
    **dict.fromkeys(("factors", "omega"), (-math.inf, math.inf)),
    **dict.fromkeys(("sigma", "levels", "std", "pollution", "at_most"), (math.ulp(0), math.inf)),
}
"""Least and most of every number that a command takes, by the option's name; infinity itself is never allowed."""


def run(function: Callable[..., Any], args: Sequence[str], prog: str, epilog: str = "") -> Any:
    """Parse `args` as the function's options, check the numbers, and call it. Exits with 2 on a mistake.

    epilog: what the help says after the function's own first lines. "None" is a text as any other: an option that is
    not wanted is left out.
    """
    description = inspect.cleandoc(function.__doc__ or "").split("Args:")[0].rstrip()
    return tyro.cli(
        checked(function),
        args=args,
        prog=prog,
        description=f"{description}\n\n{epilog}".rstrip(),
        config=(tyro.conf.DisallowNone,),
    )


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its numbers checked; its signature stays what it was."""

    @functools.wraps(function)
    def checking(*args: Any, **kwargs: Any) -> Any:
        for name, value in inspect.signature(function).bind(*args, **kwargs).arguments.items():
            check_numbers(name, value)
        return function(*args, **kwargs)

    return checking


def check_numbers(name: str, value: Any) -> None:
    """Raise UserError "--name is VALUE; ..." for a number, or one of several, out of its bounds."""
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
