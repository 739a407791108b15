"""`imagewright COMMAND ...`: finds the command's file, runs it, and tells mistakes in one sentence.

Help and a mistyped command or option are answered before anything large is imported.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from imagewright.cli.console import first_alone, say, told_errors
from imagewright.cli.known import require_known
from imagewright.errors import UserError
from imagewright.version import __version__

COMMANDS = {
    "train": ("imagewright.cli.train", "train a model by a recipe or a Python file"),
    "distill": ("imagewright.cli.distill", "train a one-step generator from a trained denoiser"),
    "sample": ("imagewright.cli.sample", "draw images from a trained or shipped model"),
    "couple": (
        "imagewright.cli.couple",
        "draw pairs of noise and image from a teacher, for methods that learn from them",
    ),
    "play": ("imagewright.cli.play", "a page in the browser to draw with models and compare them"),
    "edit": ("imagewright.cli.edit", "fill in, colour, enlarge, redraw or denoise pictures with a trained model"),
    "evaluate": ("imagewright.cli.evaluate", "measure a model, or a folder of images, against real images"),
    "compare": ("imagewright.cli.compare", "two runs' scores side by side, where they may be compared"),
    "tune": ("imagewright.cli.tune", "search over a trained model: skips, averages, solvers, time steps, SIMS"),
    "report": ("imagewright.cli.report", "write one HTML page about one or more runs"),
    "data": ("imagewright.cli.data", "inspect or convert image sets"),
    "import": ("imagewright.cli.import_", "turn official weights into a model folder, once"),
    "join": ("imagewright.cli.join", "make one model of students that each know some of the classes"),
    "export": ("imagewright.cli.export", "copy a run's model into a folder of two files"),
    "push": ("imagewright.cli.push", "upload a model to a hub of model repositories"),
    "bench": ("imagewright.cli.bench", "measure speed ratios, and the papers' claims in miniature"),
    "completion": ("imagewright.cli.completion", "print a completion script for bash or zsh"),
}
"""Every command: its file and what it is for."""
SHARED = ("train", "sample", "couple", "evaluate", "data", "distill")
"""Commands whose work several processes share; others are the first one's alone."""

EXAMPLES = """
examples:
  imagewright sample emoji64-32 --n 64
  imagewright train edm-digits --out runs/edm-digits
  imagewright train cd-digits --teacher runs/edm-digits --out runs/cd-digits
  imagewright evaluate runs/edm-digits --steps 5 9 18
  imagewright report runs/edm-digits runs/cd-digits --out report.html

`imagewright COMMAND --help` explains a command.
"""


def help_text() -> str:
    """What `imagewright --help` prints."""
    lines = [f"imagewright {__version__}: train, distil, accelerate and measure image generators", "", "commands:"]
    lines += [f"  {name:<11} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(lines) + "\n" + EXAMPLES


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exits with 0, 2 for a mistake in the input, 128 + its number after a signal (130 after Ctrl-C)."""
    args = list(sys.argv[1:] if argv is None else argv)
    with told_errors():
        if not args or args[0] in ("-h", "--help", "help"):
            say(help_text())
        elif args[0] == "--version":
            say(__version__)
        elif args[0] in COMMANDS:
            require_known(args)
            if args[0] not in SHARED and not first_alone():
                return
            importlib.import_module(COMMANDS[args[0]][0]).main(args[1:])
        else:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"commands are {', '.join(COMMANDS)}"
            raise UserError(f"there is no command {args[0]!r}; {hint}")


if __name__ == "__main__":
    main()
