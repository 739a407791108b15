"""The reference of the commands, as their parsers have them."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import tyro

from imagewright.cli import train
from imagewright.cli.composing import Run
from imagewright.cli.main import COMMANDS
from imagewright.cli.train_options import with_options
from imagewright.recipes import RECIPES

RECIPE = "edm-digits"
HEAD = """# Commands

Made from the commands' own parsers. `imagewright COMMAND --help` says the same, and `imagewright completion bash`
completes all of it in a shell. A mistake is told in one sentence, with exit code 2; after a signal the code is 128 and
its number.
"""


def page() -> str:
    """The whole page."""
    lines = [HEAD, "| command | what it does |", "|---|---|"]
    lines += [f"| [`{name}`](#{name}) | {summary} |" for name, (_, summary) in COMMANDS.items()]
    for name, (module, summary) in COMMANDS.items():
        lines += [f"\n## {name}\n", f"{_sentence(summary)}\n"]
        lines += _train() if name == "train" else _command(name, importlib.import_module(module))
    return "\n".join(lines) + "\n"


def _command(name: str, module: Any) -> Iterator[str]:
    functions = getattr(module, "COMMANDS", {})
    if name == "completion":
        yield _block("source <(imagewright completion bash)")
        return
    for word, function in functions.items():
        if word:
            yield f"### {name} {word}\n"
        yield inspect.cleandoc(function.__doc__ or "").split("Args:")[0].rstrip() + "\n"
        yield from _options(function)
    examples = getattr(module, "EPILOG", "").partition("examples:\n")[2]
    if examples:
        yield _block(inspect.cleandoc(examples))


def _train() -> Iterator[str]:
    yield _block("imagewright train RECIPE --out runs/NAME [--FIELD VALUE ...]\nimagewright train --resume runs/NAME")
    yield "Every field of a recipe is an option. Recipes by family:\n"
    yield _block(train.help_text().strip())
    yield f"### train {RECIPE}\n"
    yield "The options of one recipe; another has those of its own method, network and sampler.\n"
    yield from _options(Run, Run(experiment=with_options(RECIPES[RECIPE]())))


def _options(function: Callable[..., Any], default: Any = None) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro offers no other way to ask what a parser knows
        given = {} if default is None else {"default": default}
        config = (tyro.conf.AvoidSubcommands, tyro.conf.DisallowNone)
        actions = tyro.extras.get_parser(function, config=config, **given)._actions
    rows = [_row(action) for action in actions if action.dest != "help"]
    if rows:
        yield "\n".join(["| option | value | |", "|---|---|---|", *rows]) + "\n"


def _row(action: Any) -> str:
    names = [option for option in action.option_strings if option.startswith("--")] or [str(action.dest).upper()]
    metavar = "" if action.metavar is None else f"`{action.metavar}`"
    told = re.sub(r"\s+", " ", str(action.help or ""))
    cells = (", ".join(f"`{name}`" for name in names), metavar, _plain(told))
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is; what stands between backquotes stays."""
    parts = text.split("`")
    return "`".join(re.sub(r"([\\*_<\[\]])", r"\\\1", part) if i % 2 == 0 else part for i, part in enumerate(parts))


def _sentence(summary: str) -> str:
    return summary[0].upper() + summary[1:] + "."


def _block(text: str) -> str:
    return "\n".join(["```text", text, "```\n"])
