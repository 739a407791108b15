"""`imagewright completion bash|zsh`: a script for the shell to source."""

from __future__ import annotations

from collections.abc import Sequence

from imagewright.cli.console import say
from imagewright.cli.main import COMMANDS
from imagewright.pretrained import shipped
from imagewright.recipes import RECIPES
from imagewright.samplers import SAMPLERS
from imagewright.types import UserError

WORDS = {
    "train": [*RECIPES, "--out", "--resume", "--device", "--dry-run", "--teacher", "--help"],
    "sample": ["--n", "--seed", "--label", "--class-name", "--sampler", "--steps", "--set", "--out", "--npz"],
    "edit": ["--task", "--image", "--index", "--mask", "--factor", "--sigma", "--steps", "--levels", "--n", "--seed"],
    "evaluate": ["--data", "--split", "--n", "--seed", "--metrics", "--sampler", "--steps", "--inception", "--out"],
    "report": ["--out", "--seed"],
    "data": ["info", "convert"],
    "import": ["--config", "--out", "--kind"],
    "export": ["--out", "--half"],
    "bench": ["speed", "claims"],
    "completion": ["bash", "zsh"],
}
"""What may follow each command, besides file names."""

SCRIPT = """{zsh}_imagewright() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" words
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands}"
  elif [ "$previous" = "--sampler" ]; then
    words="{samplers}"
  else
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word") $(compgen -f -- "$word"))
}}
complete -o filenames -F _imagewright imagewright
"""


def script(shell: str) -> str:
    """The script for bash or zsh."""
    words = {**WORDS, "sample": [*shipped(), *WORDS["sample"]], "evaluate": [*shipped(), *WORDS["evaluate"]]}
    return SCRIPT.format(
        zsh="autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "",
        commands=" ".join(COMMANDS),
        samplers=" ".join(SAMPLERS),
        cases="\n".join(f'      {name}) words="{" ".join(options)}" ;;' for name, options in words.items()),
    )


def main(args: Sequence[str]) -> None:
    """Print the script."""
    if list(args) in (["--help"], ["-h"]) or not args:
        say("imagewright completion bash|zsh\n\nexample:\n  source <(imagewright completion bash)")
        return
    if args[0] not in ("bash", "zsh"):
        raise UserError(f"there is no completion for {args[0]!r}; allowed: bash, zsh")
    say(script(args[0]))
