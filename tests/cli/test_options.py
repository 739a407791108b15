"""Every number of every command has bounds, and out of them nothing is done; words stay words; completion knows all."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import subprocess
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imagewright.checks import require_number, require_whole, whole_numbers
from imagewright.cli.command import BOUNDS, options
from imagewright.cli.known import TABLE
from imagewright.cli.main import COMMANDS, main
from imagewright.recipes import RECIPES
from imagewright.types import UserError

OTHERS = ("train", "completion")
"""Commands whose options are an experiment's fields, which check themselves, or that have none."""


def commands() -> Iterator[tuple[tuple[str, ...], Callable[..., None]]]:
    for name, (module, _) in COMMANDS.items():
        if name not in OTHERS:
            for word, function in importlib.import_module(module).COMMANDS.items():
                yield ((name, word) if word else (name,)), function


def numbers(function: Callable[..., None]) -> Iterator[tuple[str, type]]:
    """Options that take numbers, and whether whole ones."""
    hints = dict(typing.get_type_hints(function))
    for hint in list(hints.values()):
        if dataclasses.is_dataclass(hint):
            hints |= {n: h for n, h in typing.get_type_hints(hint).items() if n in BOUNDS}
    for name, hint in hints.items():
        parts = {hint, *typing.get_args(hint), *(p for a in typing.get_args(hint) for p in typing.get_args(a))}
        for kind in (int, float):
            if kind in parts and name != "return":
                yield name, kind


NUMBERS = [(words, name, kind) for words, function in commands() for name, kind in numbers(function)]


def needed(function: Callable[..., None]) -> list[str]:
    """Words that a command cannot do without, of things that do not exist: numbers are looked at first."""
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            hint = typing.get_type_hints(function, include_extras=True)[name]
            words = {"task": "denoise", "std": "0.1", "size": "8", "preset": "edm"}.get(name, "nowhere")
            found += [words] if "Positional" in str(hint) else [f"--{name.replace('_', '-')}", words]
    return found


def test_the_walk_finds_numbers() -> None:
    assert (("sample",), "batch_size", int) in NUMBERS and (("tune", "sims"), "omega", float) in NUMBERS
    assert len(NUMBERS) > 40


@pytest.mark.parametrize(
    ("words", "name", "kind"), NUMBERS, ids=lambda v: "-".join(v) if isinstance(v, tuple) else None
)
def test_a_number_out_of_bounds_is_one_sentence(
    words: tuple[str, ...],
    name: str,
    kind: type,
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    least, most = BOUNDS[name]
    option = f"--{name.replace('_', '-')}"
    rest = needed(dict(commands())[words])
    if option in rest:
        del rest[rest.index(option) : rest.index(option) + 2]
    wrong = [least - 1] if kind is int else [math.nan, math.inf]
    if kind is float and least > 0:
        wrong += [0.0, -1.0]
    if kind is int and most < 100:
        wrong.append(most + 1)
    for value in wrong:
        # The command line reads --x -3 as a value, as -3 is no option.
        said = refused(*words, *rest, option, f"{value:.0f}" if kind is int else str(value))
        assert said.startswith(f"imagewright: {option} is "), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [w for w, f in commands() if any(n == "n" for n, _ in numbers(f))], ids="-".join)
def test_a_word_is_no_number(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("1.5", "many", "none", "None", ""):
        with pytest.raises(SystemExit) as stopped:
            main([*words, *needed(dict(commands())[words]), "--n", value])
        assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_folder_may_be_called_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["sample", "emoji64-32", "--n", "1", "--steps", "1", "--out", "none"])
    assert sorted(p.name for p in (tmp_path / "none").iterdir()) == ["000000.png", "grid.png", "samples.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["none"]


def test_a_class_may_be_called_none(refused: Callable[..., str], tmp_path: Path) -> None:
    said = refused("sample", "emoji64-32", "--n", "1", "--class-name", "none", "--out", str(tmp_path))
    assert "this model has no class 'none'" in said


def test_a_recipe_is_left_without_by_the_word_none(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "edm-digits", "--training.ema.rampup-ratio", "none", "--training.micro-batch", "None", "--dry-run"])
    assert '"rampup_ratio": null' in capsys.readouterr().out


# --- the checks themselves


@pytest.mark.parametrize("value", [True, 1.0, "1", None, math.nan, -1, 2**63])
def test_what_is_no_whole_number(value: object) -> None:
    with pytest.raises(UserError, match=r"n is .*; it must be a whole number >= 0"):
        require_whole("n", value, 0)


@pytest.mark.parametrize(
    ("least", "most", "sentence"),
    [
        (math.ulp(0), math.inf, "x is {}; it must be positive and finite"),
        (0, 1, "x is {}; it must be a finite number from 0 to 1"),
        (2, math.inf, "x is {}; it must be a finite number >= 2"),
        (-math.inf, 0, "x is {}; it must be a finite number <= 0"),
        (-math.inf, math.inf, "x is {}; it must be a finite number"),
    ],
)
def test_what_is_no_number_in_bounds(least: float, most: float, sentence: str) -> None:
    for value in (math.nan, math.inf, *([most + 1] if most < 2 else [])):
        with pytest.raises(UserError) as caught:
            require_number("x", value, least, most)
        assert str(caught.value) == sentence.format(value)


def test_whole_numbers_of_any_kind_are_taken() -> None:
    assert whole_numbers("x", [1, 2]).tolist() == [1, 2] and whole_numbers("x", 7).tolist() == 7
    assert whole_numbers("x", []).size == 0


# --- completion


def completed(*words: str) -> set[str]:
    """What bash offers at the end of a line."""
    script = subprocess.run(["bash", "-c", 'eval "$(cat)"; declare -f _imagewright'], input=SCRIPT, text=True,
                            capture_output=True, check=True).stdout  # fmt: skip
    line = " ".join(f"'{w}'" for w in words)
    ask = f'{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _imagewright; echo "${{COMPREPLY[@]}}"'
    # Through a pipe: an argument may have 128 KiB, which the options of all recipes fill.
    done = subprocess.run(["bash"], input=ask, capture_output=True, text=True, check=True, cwd="/")
    return set(done.stdout.split())


SCRIPT = ""


@pytest.fixture(scope="module", autouse=True)
def script() -> None:
    from imagewright.cli.completion import script as make

    global SCRIPT
    SCRIPT = make("bash")


def test_the_table_of_options_is_what_the_parsers_know() -> None:
    """Where this fails: python -m imagewright.cli.completion, and commit cli/options.json."""
    from imagewright.cli.completion import table

    assert json.loads(TABLE.read_text()) == table()


def test_completion_is_whole() -> None:
    assert completed("imagewright", "") == set(COMMANDS)
    for words, function in commands():
        offered = completed("imagewright", *words, "--")
        assert offered == {o for o in options(function) if o.startswith("--")}, words
    assert set(RECIPES) <= completed("imagewright", "train", "")


def test_completion_of_words_after_an_option() -> None:
    assert completed("imagewright", "sample", "emoji64-32", "--guidance", "") == {"auto", "cfg", "latents", "none"}
    assert {"heun", "restart"} <= completed("imagewright", "evaluate", "x", "--sampler", "")
    assert {"speed", "claims"} <= completed("imagewright", "bench", "")
    assert "--method.warmup" in completed("imagewright", "train", "scd-digits", "--method.")
    assert "--method.warmup" not in completed("imagewright", "train", "edm-digits", "--method.")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("skip", "nowhere", "--skip-scale", "0.5"), "--skip-scale has no effect here; --factors are what is tried"),
        (("sims", "nowhere", "--out", "x", "--guidance", "cfg", "--weight", "2"), "do not go with SIMS"),
        (("lcsc", "nowhere", "--out", "x", "--n", "0"), "--n is 0"),
        (("times", "nowhere", "--seed", "-1"), "--seed is -1"),
    ],
)
def test_every_search_takes_the_same_options_of_its_score(
    words: tuple[str, ...], complaint: str, refused: Callable[..., str]
) -> None:
    assert complaint in refused("tune", *words)
    for search, function in dict(commands()).items():
        if search[0] == "tune" and search[1] not in ("ema", "bespoke", "quantize"):  # which score no images
            assert {"--n", "--seed", "--data", "--inception", "--guidance", "--device"} <= set(options(function))
