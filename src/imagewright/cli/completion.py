"""`imagewright completion bash|zsh`: a script for the shell to source, made from the commands' own parsers."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from imagewright.cli.command import options
from imagewright.cli.composing import COMPOSED, Run
from imagewright.cli.console import say
from imagewright.cli.known import TABLE
from imagewright.cli.main import COMMANDS
from imagewright.cli.train_options import with_options
from imagewright.pretrained import shipped
from imagewright.recipes import RECIPES
from imagewright.samplers import PRESETS, SAMPLERS
from imagewright.types import UserError

Words = Mapping[str, tuple[str, ...]]
SHELLS = ("bash", "zsh")
MODELS = ("sample", "play", "edit", "evaluate", "couple", "tune")
"""Commands whose first word may be a shipped model."""
SCRIPT = """{zsh}_imagewright() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" words="" files=yes
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands}" files=no
  else
    case "${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}" in
{cases}
    esac
    case "$previous" in
{values}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [ "$files" = no ] || COMPREPLY+=($(compgen -f -- "$word"))
}}
complete -o filenames -F _imagewright imagewright
"""


def script(shell: str) -> str:
    """The script for bash or zsh."""
    cases: list[str] = []
    values: dict[str, set[str]] = {"--sampler": {*SAMPLERS, *PRESETS}}
    for names, known in _commands():
        cases.append(f'      {_pattern(names)}) words="{" ".join(known)}" ;;')
        for option, words in known.items():
            if words:
                values.setdefault(option, set()).update(words)
    return SCRIPT.format(
        zsh="autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "",
        commands=" ".join(COMMANDS),
        cases="\n".join(cases),
        values="\n".join(f'      {o}) words="{" ".join(sorted(w))}" files=no ;;' for o, w in sorted(values.items())),
    )


def table() -> dict[str, Any]:
    """Every option of every command by its first words, for `known`; commands that have the same share a list."""
    lists: list[list[str]] = []
    commands: dict[str, int] = {}
    for names, known in _commands():
        options_ = sorted(word for word in known if word.startswith("--"))
        if names == ("train *",) or options_ in ([], ["--help"]):  # a user's own file; a command that has sub-commands
            continue
        if options_ not in lists:
            lists.append(options_)
        commands |= dict.fromkeys((name.removesuffix(" *") for name in names), lists.index(options_))
    return {"commands": commands, "options": lists}


def _pattern(names: tuple[str, ...]) -> str:
    """First words as the shell's `case` has them; " *" stands for anything."""
    return "|".join(f'"{name[:-1]}"*' if name.endswith(" *") else f'"{name}"' for name in names)


@cache
def _commands() -> tuple[tuple[tuple[str, ...], Words], ...]:
    return tuple(_found())


def _found() -> Iterator[tuple[tuple[str, ...], Words]]:
    """The first two words (or one, and " *"), the more special first, and all that may follow."""
    for name, (module, _) in COMMANDS.items():
        if name == "train":
            yield from _recipes()
            continue
        if name == "distill":
            yield (f"{name} *",), {**dict.fromkeys(shipped(), ()), **_composed("distill")}
            continue
        if name == "completion":
            yield (f"{name} *",), dict.fromkeys(SHELLS, ())
            continue
        functions = importlib.import_module(module).COMMANDS
        models = dict.fromkeys(shipped() if name in MODELS else (), ())
        for word, function in functions.items():
            yield (f"{name} {word or '*'}",), {**models, **options(function)}
        if "" not in functions:
            yield (f"{name} *",), dict.fromkeys((*functions, "--help"), ())


def _recipes() -> Iterator[tuple[tuple[str, ...], Words]]:
    """Recipes whose experiments are of the same classes have the same options."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, recipe in RECIPES.items():
        alike.setdefault(tuple(_classes(recipe())), []).append(name)
    yield from (((f"train {name}",), _composed(name)) for name in COMPOSED)
    for names in alike.values():
        known = options(Run, Run(experiment=with_options(RECIPES[names[0]]())))
        yield tuple(f"train {name}" for name in names), known
    yield ("train *",), dict.fromkeys((*COMPOSED, *RECIPES, "--resume", "--help"), ())


def _composed(name: str) -> Words:
    kind, like = COMPOSED[name][0], {"auto": "edm-digits", "distill": "cd-digits"}[name]
    return options(kind, kind(experiment=with_options(RECIPES[like]())))


def _classes(value: Any) -> Iterator[str]:
    if dataclasses.is_dataclass(value):
        yield type(value).__name__
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            yield f"{field.name}:{inner is None}"
            yield from _classes(inner)


def main(args: Sequence[str]) -> None:
    """Print the script."""
    if list(args) in (["--help"], ["-h"]) or not args:
        say("imagewright completion bash|zsh\n\nexample:\n  source <(imagewright completion bash)")
        return
    if args[0] not in SHELLS:
        raise UserError(f"there is no completion for {args[0]!r}; allowed: {', '.join(SHELLS)}")
    say(script(args[0]))


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(), indent=0) + "\n")
