"""What experiment.json holds: the resolved configuration, what it was given, how it was started; and the way back.

A run is rebuilt from its record alone (`experiment_from_json`): classes are looked up in the package, and no file that
the record names is run. What a run is given (images, teacher, tokenizer, starting weights, pairs) is recorded with a
fingerprint, so that it may move, and may not change.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import json
import math
import os
import pkgutil
import types
import typing
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import torch

from imagewright.files import read_formatted
from imagewright.metrics.perceptual import CHOICES
from imagewright.metrics.vision_transformers import FAMILIES
from imagewright.pretrained import CHAIN, shipped
from imagewright.shapes import brief, misfit
from imagewright.training.checkpoint import checkpoints, run_of
from imagewright.types import UserError, an
from imagewright.version import versions

FORMAT = "imagewright-experiment/1"
EMBEDDED = ("digits", "emoji64")
PLACES: Mapping[str, str] = {
    "data": "data.source",
    "pictures": "data.pictures",
    "couplings": "data.couplings",
    "start": "start",
}
"""What every run may be given beside what its method asks for, and the field that says where it is."""
FREE = (
    "training.total_images",
    "training.keep_checkpoints",
    "training.log_images",
    "training.snapshot_images",
    "training.checkpoint_images",
    "training.weights_images",
    "training.micro_batch",
    "training.recompute",
    "training.parallel",
    "data.workers",
    "data.latents",
)
"""Settings that a resumed run may change: how long it lasts, what it writes when, how a batch is cut up, read and held
in memory."""
Inputs = dict[str, dict[str, Any]]
"""Of each thing that a run was given: what identifies it, `where` it lies from the run's folder, and the absolute
`places` where it lay."""


class _Input(TypedDict):
    where: NotRequired[str]
    places: NotRequired[list[str]]


class RunRecord(TypedDict):
    """What experiment.json holds, as far as it is read."""

    format: str
    command: NotRequired[list[str] | None]
    experiment: dict[str, Any]
    inputs: NotRequired[dict[str, _Input]]
    computed: NotRequired[list[dict[str, Any]]]
    versions: NotRequired[dict[str, str]]
    run: NotRequired[str]


def places(experiment: Any) -> dict[str, str]:
    """Of each thing that a run is given, the path of the value that says where it lies; also of its JSON."""
    found = dict(PLACES)
    pairs = get_field(experiment, PLACES["couplings"])
    if isinstance(pairs, (list, tuple)):
        del found["couplings"]
        found |= {f"couplings.{i}": f"{PLACES['couplings']}.{i}" for i in range(len(pairs))}
    for name, where in (get_field(experiment, "given") or {}).items():
        if where not in CHOICES:  # of features
            several = {f"{name}.{i}": f"given.{name}.{i}" for i in range(len(where))}
            found |= {name: f"given.{name}"} if isinstance(where, str) else several
    return found


def read_record(folder: Path) -> RunRecord:
    """The record of a run. Raises UserError when it is missing or damaged."""
    record: RunRecord = read_formatted(folder / "experiment.json", FORMAT, RunRecord)
    experiment = _as_of_today(record["experiment"])
    fault = misfit(experiment.get("given", {}), dict[str, str | list[str]], "experiment.given")
    if fault is not None:
        raise UserError(f"{folder / 'experiment.json'} is damaged: {fault}")
    return {**record, "experiment": experiment}


def _as_of_today(experiment: dict[str, Any]) -> dict[str, Any]:
    """An experiment's JSON as it is written now.

    Earlier ones had a field for each thing that a method asks for; the first had null for EDM without augmentation.
    """
    method = experiment.get("method")
    if isinstance(method, dict) and method.get("class") == "EDM" and method.get("augment", 0) is None:
        experiment = {**experiment, "method": {k: v for k, v in method.items() if k != "augment"}}
    if "given" not in experiment and experiment.get("class") == "Experiment":
        earlier = ("teacher", "tokenizer", "features")
        given = {name: experiment[name] for name in earlier if experiment.get(name) is not None}
        experiment = {**{k: v for k, v in experiment.items() if k not in earlier}, "given": given}
    return cast("dict[str, Any]", with_defaults(experiment))


def with_defaults(value: Any) -> Any:
    """Recorded JSON with the fields that its classes have got since; their default is what was done before."""
    if isinstance(value, list):
        return [with_defaults(each) for each in value]
    if not isinstance(value, dict):
        return value
    name = value.get("class")
    cls = classes().get(name) if isinstance(name, str) else None
    known = {key: with_defaults(each) for key, each in value.items()}
    for field in dataclasses.fields(cls) if cls is not None else ():
        if field.name not in known and field.default is not dataclasses.MISSING:
            known[field.name] = to_json(field.default)
        elif field.name not in known and field.default_factory is not dataclasses.MISSING:
            known[field.name] = to_json(field.default_factory())
    return known


def begun_as(folder: Path) -> str | None:
    """What the checkpoints of a run call it that an earlier version began; None for one that this version did.

    A field that a class has got since changes `identity`, and not the run: its newest checkpoint says what it is.
    """
    path = folder / "experiment.json"
    if not path.exists():
        return None
    record = read_formatted(path, FORMAT, RunRecord)
    if "run" in record:
        return record["run"]
    found = checkpoints(folder / "checkpoints")
    return run_of(found[-1]) if found and record["experiment"] != _as_of_today(record["experiment"]) else None


def identity(experiment: Any, inputs: Inputs) -> str:
    """What a run is: its settings and what it was given, not where that lies nor how long it lasts; hexadecimal."""
    settings = to_json(experiment)
    for path in (*FREE, *places(settings).values()):
        *parents, last = path.split(".")
        inner = get_field(settings, ".".join(parents)) if parents else settings
        if isinstance(inner, dict):
            inner.pop(last, None)
        elif isinstance(inner, list):
            inner[int(last)] = None
    known = {name: {k: v for k, v in of.items() if k not in ("where", "places")} for name, of in inputs.items()}
    return sha256(json.dumps([settings, known], sort_keys=True, default=str).encode()).hexdigest()


def to_json(value: Any) -> Any:
    """Dataclasses as dictionaries that name their class; JSON has no infinity, so it is written as a string."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **pairs}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {name: to_json(v) for name, v in value.items()}
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def experiment_from_json(value: Any, where: Path) -> Any:
    """Inverse of `to_json`. Raises UserError naming `where` for a class or field that this version does not know."""
    try:
        return _from_json(value, Any)
    except _Unknown as unknown:
        raise UserError(f"{where} names the {unknown}, which this version does not have") from None
    except UserError as error:
        raise UserError(f"{where} is damaged: {error}") from None
    except (TypeError, AttributeError, KeyError, ValueError, OverflowError) as error:
        raise UserError(f"{where} is damaged: {error}") from None


class _Unknown(Exception):  # noqa: N818 - a finding, told by `experiment_from_json`
    pass


def _from_json(value: Any, annotation: Any) -> Any:
    if isinstance(value, dict) and typing.get_origin(annotation) is collections.abc.Mapping:
        return {name: _from_json(v, Any) for name, v in value.items()}
    if isinstance(value, dict):
        name = value.get("class")
        cls = classes().get(name) if isinstance(name, str) else None
        if cls is None:
            raise _Unknown(f"class {brief(name)}")
        hints = typing.get_type_hints(cls)
        strange = [name for name in value if name != "class" and name not in hints]
        if strange:
            raise _Unknown(f"field {strange[0]!r} of {cls.__name__}")
        given = {name: _from_json(v, hints[name]) for name, v in value.items() if name != "class"}
        for name, each in given.items():
            fault = misfit(each, hints[name], f"{cls.__name__}.{name}", finite=False)
            if fault is not None:
                raise UserError(fault)
        return cls(**given)
    if isinstance(value, list):
        return tuple(_from_json(v, _inner(annotation)) for v in value)
    if isinstance(value, str) and any(unicodedata.category(letter) == "Cc" for letter in value):
        raise UserError(f"it holds {brief(value)}, which has control characters")
    if value in ("inf", "-inf") and float in _members(annotation):
        return float(value)
    return value


def _members(annotation: Any) -> tuple[Any, ...]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def _inner(annotation: Any) -> Any:
    for member in _members(annotation):
        if typing.get_origin(member) is tuple:
            return typing.get_args(member)[0]
    return Any


@cache
def classes() -> Mapping[str, type]:
    """Every public dataclass that an experiment may hold, by its name: of methods, networks, samplers, settings."""
    found: dict[str, type] = {}
    for package in ("methods", "networks", "samplers", "paths", "data", "training"):
        root = importlib.import_module(f"imagewright.{package}")
        for info in pkgutil.iter_modules(root.__path__, f"{root.__name__}."):
            module = importlib.import_module(info.name)
            for name, member in vars(module).items():
                if not isinstance(member, type) or member.__module__ != module.__name__ or name.startswith("_"):
                    continue
                if dataclasses.is_dataclass(member):
                    assert name not in found, f"{member.__module__} and {found[name].__module__} both have {an(name)}"
                    found[name] = cast(type, member)
    return found


def located(experiment: Any, folder: Path) -> Any:
    """The experiment with absolute paths of what it is given, wherever that is found.

    A path that is not there is looked for where the run in `folder`, if any, had it under that name: at every place
    where it lay, and at the same way from the run's folder. What is nowhere stays as it is written.
    """
    record: Mapping[str, Any] = read_record(folder) if (folder / "experiment.json").exists() else {}
    for name, field in places(experiment).items():
        value = get_field(experiment, field)
        if value is None or value in EMBEDDED or value in shipped() or value.startswith("standin_"):
            continue
        known = record.get("inputs", {}).get(name, {})
        family, written = _apart(value)
        before = [Path(str(place)) for place in known.get("places", ())]
        before += [folder / str(known["where"])] if known.get("where") else []
        known_as = {path.name for path in before}  # another name is another thing, whatever the run had
        candidates = [Path(written), *(before if Path(written).name in known_as else ())]
        there = [path for path in candidates if path.exists()]
        if there:
            experiment = set_field(experiment, field, family + os.path.abspath(there[0]))
    return experiment


def _apart(value: str) -> tuple[str, str]:
    """The family of networks that a path is said to be of ("dinov2:", or ""), and the path."""
    family, colon, path = value.partition(":")
    return (family + colon, path) if family in FAMILIES and path else ("", value)


def get_field(value: Any, path: str) -> Any:
    """The value at a dotted path, of dataclasses or of their JSON; None where there is none."""
    for name in path.split("."):
        if isinstance(value, (list, tuple)):
            value = value[int(name)] if name.isdecimal() and int(name) < len(value) else None
        else:
            value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
    return value


def set_field(value: Any, path: str, new: Any) -> Any:
    """A copy of nested dataclasses, mappings and tuples with the value at a dotted path replaced."""
    name, _, rest = path.partition(".")
    inner = set_field(get_field(value, name), rest, new) if rest else new
    if isinstance(value, Mapping):
        return {**value, name: inner}
    if isinstance(value, tuple):
        return tuple(inner if i == int(name) else each for i, each in enumerate(value))
    return dataclasses.replace(value, **{name: inner})


def experiment_record(
    experiment: Any,
    command: Sequence[str] | None,
    folder: Path,
    inputs: Inputs,
    before: Inputs,
    computed: Mapping[str, Any],
    begun: str | None = None,
) -> dict[str, Any]:
    """What experiment.json holds. command: arguments of `imagewright train`. folder: the run's. begun: `begun_as`.

    inputs, before: what identifies what the run is given, now and in the record that it goes on from. computed: how it
    computes from now on; other ways of earlier starts stand before it.
    """
    given: Inputs = {}
    where = places(experiment)
    for name, identity in inputs.items():
        value = get_field(experiment, where[name]) if name in where else None  # a shipped classifier lies nowhere
        given[name] = dict(identity)
        path = "" if value is None else _apart(value)[1]
        if os.path.isabs(path):
            given[name]["where"] = os.path.relpath(path, folder.resolve())
            given[name]["places"] = list(dict.fromkeys([path, *before.get(name, {}).get("places", ())]))
    earlier = read_record(folder).get("computed", []) if (folder / "experiment.json").exists() else []
    return {
        "format": FORMAT,
        "command": None if command is None else list(command),
        "experiment": to_json(experiment),
        "inputs": given,
        "computed": [*(each for each in earlier if each != computed), dict(computed)],
        "versions": versions(),
        **({} if begun is None else {"run": begun}),
    }


def how_computed(world: int, device: Any, precision: str) -> dict[str, Any]:
    """What the last bits of a run depend on besides its settings: another of these may round otherwise."""
    threads, matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
    return {"processes": world, "threads": threads, "device": str(device), "precision": precision, "matmul": matmul}


def claim(folder: Path, experiment: Any, resume: bool) -> Inputs:
    """Refuse to mix two runs in one folder; returns what the run that is there was given, {} for none.

    Raises UserError where there is a run and it is not resumed, or is resumed with other settings.
    """
    path = folder / "experiment.json"
    if (folder / CHAIN).exists():
        raise UserError(f"{folder} holds a chain of runs; choose another --out")
    if not path.exists():
        return {}
    if not resume:
        raise UserError(f"{folder} already holds a run; add --resume to go on with it, or choose another --out")
    before = read_record(folder)
    changed = _differences(before["experiment"], to_json(experiment))
    moved = [f for f in places(experiment).values() if get_field(before["experiment"], f) and get_field(experiment, f)]
    changed = [name for name in changed if name not in (*FREE, *moved)]
    if changed:
        raise UserError(f"{folder} holds a run with another {', '.join(changed)}; resume it with its own settings")
    return {name: dict(known) for name, known in before.get("inputs", {}).items()}


def check_inputs(folder: Path, before: Inputs, now: Inputs, experiment: Any) -> None:
    """Raise UserError where something that a resumed run is given is not what it was given before."""
    for name, identity in before.items():
        known = {k: v for k, v in identity.items() if k not in ("where", "places")}
        changed = [k for k, v in known.items() if name in now and now[name].get(k) != v]
        if changed:
            what = "; ".join(f"{k} was {_short(known[k])} and is {_short(now[name].get(k))}" for k in changed)
            source = get_field(experiment, places(experiment)[name])
            raise UserError(f"{folder} was trained with other {name} than {source} now holds: {what}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(k for k in b if k not in a)]
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{path}.{k}" if path else k)]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in _differences(x, y, f"{path}.{i}")]
    return [] if a == b else [path]


def merged(command: Sequence[str], more: Sequence[str]) -> list[str]:
    """One command of two: options of `more` replace the same ones; what says where and how to start is left out."""
    options: dict[str, list[str]] = {}
    for words in (command, more):
        for group in _groups(words):
            options[option_name(group[0])] = group
    return [word for key, group in options.items() if key not in ("resume", "dry-run", "out") for word in group]


def _groups(words: Sequence[str]) -> list[list[str]]:
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups


def option_name(word: str) -> str:
    """What an option sets, without its dashes: --data.no-xflip sets data.xflip; "" for a word that is none."""
    if not word.startswith("--"):
        return ""  # the recipe
    parts = word.removeprefix("--").split("=")[0].replace("_", "-").split(".")
    return ".".join([*parts[:-1], parts[-1].removeprefix("no-")])


def repeat_command(record: Mapping[str, Any]) -> list[str] | None:
    """The command that trains a run again, from any folder; None where none was recorded.

    What it was given is named by the path where that lay, absolute.
    """
    command = record.get("command")
    if not command:
        return None
    more = [command[0]]
    settings = record.get("experiment", {})
    for field in PLACES.values():
        value = get_field(settings, field)
        values = value if isinstance(value, list) else [value]
        if any(map(_elsewhere, values)):
            more += [f"--{field}", *values]
    for name, where in (settings.get("given") or {}).items():
        values = [where] if isinstance(where, str) else list(where)
        if any(map(_elsewhere, values)):
            more += [f"--{name}", *values]
    return ["train", *merged(command, more)]


def _elsewhere(value: Any) -> bool:
    return isinstance(value, str) and os.path.isabs(value)
