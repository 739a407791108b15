"""How commands name a model, what changes it, and a sampler: `MODEL --guidance auto --guide RUN --sampler restart`."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from torch import nn

from imagewright.checks import require_whole
from imagewright.errors import an
from imagewright.files import read_json
from imagewright.guidance import (
    Guided,
    LayerSkipped,
    SkipScale,
    SkipTuned,
    classifier_free,
    knows_no_label,
    latent_guidance,
)
from imagewright.models.discrete_latents import told_latents
from imagewright.models.files import ModelFile, weights_hash
from imagewright.models.weighted import at_weight, takes_weight
from imagewright.precision import Drawn
from imagewright.pretrained import find_model
from imagewright.samplers import PRESETS, SAMPLERS
from imagewright.samplers.generator import (
    ImageGenerator,
    generator_from,
    sampler_from_json,
    sampler_to_json,
    usual_sampler,
)
from imagewright.shapes import misfit
from imagewright.training.distributed import pick_device
from imagewright.types import Sampler, UserError, kind_of


def make_sampler(file: ModelFile, name: str | None, steps: int | None, settings: tuple[str, ...]) -> Sampler | None:
    """The sampler asked for; None = the model's own. Settings that are not given stay as the model was saved with."""
    saved = dict(file.sampler or {})
    if name is None and steps is None and not settings:
        return None
    saved = saved or sampler_to_json(usual_sampler(file.model))
    chosen = name or saved["class"]
    if chosen.endswith(".json"):
        if steps is not None or settings:
            raise UserError(f"{chosen} holds a whole sampler; --steps and --set do not go with it")
        return sampler_from_json(dict(read_tuned(Path(chosen))["sampler"]))
    values: dict[str, Any] = saved if saved.get("class") == chosen else {"class": chosen}
    if chosen in PRESETS:
        values = sampler_to_json(PRESETS[chosen])
        chosen = values["class"]
    if chosen not in SAMPLERS:
        near = difflib.get_close_matches(chosen, [*SAMPLERS, *PRESETS], n=1)
        raise UserError(f"there is no sampler {chosen!r}; {_hint(near, [*SAMPLERS, *PRESETS])}")
    known = {f.name for f in fields(SAMPLERS[chosen])}
    if steps is not None and "num_steps" not in known:
        raise UserError(f"sampler {chosen!r} takes no --steps; its settings are --set {', '.join(sorted(known))}")
    given = [*settings, *([f"num_steps={steps}"] if steps is not None else [])]
    for setting in given:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set takes name=value, got {setting!r}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"sampler {chosen!r} has no setting {key!r}; {_hint(near, sorted(known))}")
        values[key] = _parse(text)
    try:
        return sampler_from_json(values)
    except TypeError as error:
        raise UserError(f"sampler {chosen!r} with {', '.join(given)}: {error}") from None


TUNED = "imagewright-tuned/1"
"""Format of the files that `imagewright tune` writes."""


class _Tuned(TypedDict):
    format: str
    sampler: dict[str, Any]
    skips: NotRequired[list[tuple[float, list[int]]] | None]
    weight: NotRequired[float | None]


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is changed about a model without training it."""

    guidance: Literal["none", "auto", "cfg", "latents"] = "none"
    """auto: away from a worse model of the same kind (--guide); cfg: away from the model without its label; latents:
    away from the model without its discrete latents."""
    guide: str | None = None
    """Of guidance auto: a run that is smaller or less trained, or trained on the model's own samples (SIMS)."""
    weight: float | None = None
    """Strength of the guidance; 1 is none. Of a student that is told it, without --guidance: within its training."""
    interval: tuple[float, float] | None = None
    """Noise levels between which to guide, low first; default all."""
    guided_channels: int | None = None
    """How many of the channels are guided, from the first; default all. Published latents of DiT's kind: 3."""
    skip_scale: float | None = None
    """Skip-Tuning: factor on the U-Net's lowest skip connection, rising to 1 at the top."""
    precision: Drawn | None = None
    """Number format of the networks' calls when drawing (fp32, bf16, fp16); default fp32. int8 multiplies whole numbers
    in what `imagewright tune quantize` made, on a CPU: faster, but for small networks and single pictures."""

    def apply(self, file: ModelFile, *, draws: bool = False) -> nn.Module:
        """The changed model. draws: whether its images are drawn by an `ImageGenerator`, who minds the precision.

        Raises UserError for options that do not fit together or do not fit the model.
        """
        if self.precision is not None and not draws:
            raise UserError(f"--precision is {self.precision}; it has no effect here, where no images are drawn by it")
        model = file.model
        if takes_weight(model):
            if self.guidance != "none":
                raise UserError(
                    f"--guidance {self.guidance} has no effect: this model is told the strength of guidance; give "
                    "--weight alone"
                )
            model = model if self.weight is None else at_weight(model, self.weight)
        if self.skip_scale is not None:
            model = SkipTuned(model, SkipScale(bottom=self.skip_scale))
        if self.guidance == "none":
            for name in ("guide", "weight", "interval", "guided_channels"):
                if getattr(self, name) is not None and not (name == "weight" and takes_weight(file.model)):
                    option = f"--{name.replace('_', '-')}"
                    raise UserError(f"{option} needs --guidance auto, --guidance cfg or --guidance latents")
            return model
        if self.weight is None:
            raise UserError(f"--guidance {self.guidance} needs --weight; 1 is no guidance, 1.5 to 3 are usual")
        interval, channels = self.interval or (0.0, math.inf), self.guided_channels
        if channels is not None:
            require_whole("--guided-channels", channels, 1, _channels_of(file))
        if self.guidance in ("cfg", "latents"):
            if self.guide is not None:
                raise UserError(f"--guide goes with --guidance auto; --guidance {self.guidance} asks the model itself")
            denoiser = _denoiser(model)
            if self.guidance == "latents":
                _require_latents(file)
                return latent_guidance(denoiser, self.weight, interval, channels)
            _require_label_dropout(file)
            return classifier_free(denoiser, self.weight, interval, channels)
        return Guided(_denoiser(model), _denoiser(self._guide_for(file)), self.weight, interval, channels)

    def record(self) -> dict[str, Any]:
        """What a record of samples or scores says of the changes; {} for none."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        record = {k: v for k, v in named.items() if v not in (None, "none")}
        if self.guide is not None:
            record["guide_sha256"] = weights_hash(find_model(self.guide).model.state_dict())
        return record

    def _guide_for(self, file: ModelFile) -> nn.Module:
        if self.guide is None:
            raise UserError("--guidance auto needs --guide, a run of the same data that is smaller or less trained")
        guide = find_model(self.guide)
        for what in ("resolution", "channels", "num_classes"):
            ours, theirs = getattr(file.spec, what), getattr(guide.spec, what)
            if ours != theirs:
                raise UserError(f"guide {self.guide} has {what} {theirs}; the model has {ours}")
        alike = file.space is None if guide.space is None else guide.space.same_as(file.space)
        if not alike:
            raise UserError(f"guide {self.guide} sees other latents than the model, or one of the two sees images")
        return guide.model


def _channels_of(file: ModelFile) -> int:
    """Of what a model's network sees: its latents, or its pictures."""
    config = getattr(getattr(file.model, "network", None), "config", None)
    return int(getattr(config, "in_channels", file.spec.channels))


def _require_label_dropout(file: ModelFile) -> None:
    if not file.spec.num_classes:
        raise UserError("--guidance cfg needs a model with classes; this one has none")
    if not knows_no_label(file.model):
        raise UserError(
            "--guidance cfg needs a model trained with --network.label-dropout above 0; this one always saw its label"
        )


def _require_latents(file: ModelFile) -> None:
    told = told_latents(file.model)
    if told is None or told.prior is None:
        raise UserError(
            "--guidance latents needs a model with discrete latents and a prior of them (disco-digits-prior)"
        )


def _denoiser(model: nn.Module) -> Any:
    kind = kind_of(model)
    if kind != "denoiser":
        own = "; masked decoding has its own, --set guidance=2" if kind == "token_model" else ""
        raise UserError(f"guidance needs denoisers; {an(type(model).__name__)} is {an(kind.replace('_', ' '))}{own}")
    return model


def read_tuned(path: Path) -> dict[str, Any]:
    """A file that `imagewright tune` wrote: "sampler", and perhaps "skips". Raises UserError for another."""
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != TUNED or "sampler" not in record:
        raise UserError(
            f"{path} holds no sampler; `imagewright tune bespoke` and `tune autodiffusion` write such files"
        )
    fault = misfit(record, _Tuned)
    if fault is not None:
        raise UserError(f"{path} is damaged: {fault}")
    return record


def make_generator(
    file: ModelFile,
    name: str | None,
    steps: int | None,
    settings: tuple[str, ...],
    device: str,
    changes: Changes | None = None,
) -> ImageGenerator:
    """A generator on a device with the sampler asked for, of the changed model."""
    sampler = make_sampler(file, name, steps, settings)
    if name is not None and name.endswith(".json"):
        found = read_tuned(Path(name))
        if found.get("skips"):
            file = replace(file, model=LayerSkipped(file.model, {float(level): ids for level, ids in found["skips"]}))
        if found.get("weight") is not None:
            if changes and changes.weight is not None:
                raise UserError(f"{name} holds the strength that belongs to its sampler; --weight does not go with it")
            file = replace(file, model=at_weight(file.model, found["weight"]))
    changed = replace(file, model=changes.apply(file, draws=True)) if changes else file
    precision = changes.precision if changes else None
    return generator_from(changed, sampler, pick_device(device), precision=precision or "fp32")


def _parse(text: str) -> Any:
    """A JSON value (numbers, lists, true); anything else is a word."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _hint(near: list[str], all_names: list[str]) -> str:
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(all_names)}"
