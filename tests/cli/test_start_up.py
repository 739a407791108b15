"""What is answered before anything large is imported: help, a mistyped command, a mistyped option."""

from __future__ import annotations

import subprocess
import sys

import pytest

from imagewright.cli import known
from imagewright.errors import UserError, an

ASK = """
import sys
import imagewright
from imagewright.cli.main import main
for words in {words!r}:
    try:
        main(words)
    except SystemExit as ended:
        assert ended.code == 2
large = sorted({{"torch", "numpy", "scipy", "PIL", "tyro", "matplotlib", "sklearn"}} & {{*sys.modules}})
print(large, len(sys.modules), file=sys.stderr)
"""
MOST = 250
"""Modules that may be there: 176 now, thousands with torch."""
WORDS = [["--help"], ["smaple"], ["sample", "--nn", "3"], ["train", "edm-digits", "--training.btach=3"]]


def test_help_and_mistakes_need_no_torch() -> None:
    """In one process; measured 0.1 s of CPU (it was 2.4 for the help alone), whose cause is what is imported."""
    done = subprocess.run([sys.executable, "-c", ASK.format(words=WORDS)], capture_output=True, text=True, check=True)
    assert "imagewright COMMAND --help" in done.stdout
    told = done.stderr.splitlines()
    assert "did you mean 'sample'?" in told[0] and "did you mean --n?" in told[1]
    assert "did you mean --training.batch?" in told[2]
    large, modules = told[3].rsplit(" ", 1)
    assert large == "[]" and int(modules) < MOST


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "m", "--batch_size=3", "--npz"],
        ["train", "edm-digits", "--training.ema.power-std", "0.1", "--data.no-xflip"],
        ["train", "my_run.py", "--method.anything", "1"],
        ["tune", "lcsc", "run", "--until", "-5"],
        ["data", "--unheard-of", "--help"],
    ],
)
def test_what_may_be_right_goes_to_the_parser(words: list[str]) -> None:
    known.require_known(words)


def test_the_nearest_option_is_named() -> None:
    with pytest.raises(UserError, match=r"`imagewright tune` has no option --untill; did you mean --until\?"):
        known.require_known(["tune", "lcsc", "run", "--untill", "3"])
    with pytest.raises(UserError, match="`imagewright sample --help` lists them"):
        known.require_known(["sample", "--zzzzzzzz"])
    with pytest.raises(UserError, match="`imagewright train wrn-digits` has no option --autoencoder; `imagewright tr"):
        known.require_known(["train", "wrn-digits", "--autoencoder", "runs/kl-digits"])


@pytest.mark.parametrize(
    ("noun", "told"),
    [("encoder", "an encoder"), ("flow map", "a flow map"), ("ImageText", "an ImageText"), ("UNet", "a UNet")],
)
def test_articles(noun: str, told: str) -> None:
    assert an(noun) == told


def test_a_folder_after_resume_is_where_no_recipe_is() -> None:
    with pytest.raises(UserError, match="a run goes on with `imagewright train --resume runs/x`, or with its recipe"):
        known.require_known(["train", "edm-digits", "--resume", "runs/x"])
    known.require_known(["train", "--resume", "runs/x", "--training.batch", "4"])
    known.require_known(["train", "edm-digits", "--resume", "--out", "runs/x"])
