"""Options of a run: one for each field of its experiment, and for each thing that its method asks for."""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any

import tyro

from imagewright.models.kinds import words
from imagewright.training.experiment import Experiment
from imagewright.training.given import SPACE, Request, options, require_asked


def with_options(experiment: Experiment) -> Experiment:
    """The experiment with an option for each thing that its method asks for, and the values that it has of them.

    Raises UserError where it has one that its method does not ask for.
    """
    require_asked(experiment.method, experiment.given)
    asked = options(experiment.method)
    shown_as: list[tuple[str, Any, Any]] = []
    for name, request in asked.items():
        value = experiment.given.get(name)
        several = request.several or isinstance(value, tuple)  # if it is too many, `given.gather` says so
        if several and not isinstance(value, tuple):
            value = () if value is None else (value,)
        kind: Any = tuple[str, ...] if several else str | None
        told = Annotated[kind, tyro.conf.arg(help=_told(name, request))]
        shown_as.append((name, told, field(default=value)))
    given = make_dataclass("Given", shown_as, frozen=True, kw_only=True)
    shown = ("given", Annotated[given, tyro.conf.arg(name="")], field(default_factory=given))
    unchecked = {"__post_init__": lambda self: None}  # what it holds is no experiment yet
    parsed = make_dataclass("Options", [shown], bases=(Experiment,), namespace=unchecked, frozen=True, kw_only=True)
    values = {each.name: getattr(experiment, each.name) for each in fields(Experiment)}
    result: Experiment = parsed(**{**values, "given": given()})
    return result


def without_options(parsed: Any) -> Experiment:
    """Inverse of `with_options`."""
    values = {each.name: getattr(parsed, each.name) for each in fields(Experiment)}
    given = {each.name: getattr(parsed.given, each.name) for each in fields(parsed.given)}
    return Experiment(**{**values, "given": {name: where for name, where in given.items() if where}})


def _told(name: str, request: Request) -> str:
    if name == "features" and not request.kinds:
        return (
            "What a perceptual distance compares by: digits or emoji (shipped classifiers), or lpips (VGG, where that "
            "package and its weights are installed); none = the classifier of the data set, where there is one."
        )
    if not request.kinds:
        return str(getattr(request.type, "about", "Where it lies."))
    if request is SPACE:
        return (
            "Run, model folder or shipped model: the autoencoder in whose latents the model shall live; or a model in "
            "latents, to live beside; none = images."
        )
    kinds = " or ".join(map(words, request.kinds))
    usual = "; none = the images' own 8-bit values" if "codec" in request.kinds else ""
    return f"{'Runs' if request.several else 'Run'}, model folder or shipped model: {kinds}{usual}."


NONE = tyro.constructors.ConstructorRegistry()
"""An option of a recipe is left empty by the word none; of other commands, by leaving it out."""


@NONE.primitive_rule
def _none(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[None] | None:
    if info.type is not type(None):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="none",
        choices=("none", "None"),
        instance_from_str=lambda args: None,
        is_instance=lambda x: x is None,
        str_from_instance=lambda instance: ["none"],
    )
