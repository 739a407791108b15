"""`imagewright tune quantize MODEL`: the same model with weights, and inputs of its layers, of few bits; no data."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from imagewright.cli.console import OUT, bar, say, table
from imagewright.cli.sampling import make_generator
from imagewright.cli.tune_common import fresh
from imagewright.models.files import ModelFile, save_model
from imagewright.models.image_text import ImageText
from imagewright.models.kinds import KINDS, words
from imagewright.networks.quantized import count_parameters
from imagewright.noise import StepNoise
from imagewright.training.distributed import pick_device
from imagewright.tuning import quantization as q
from imagewright.tuning.synthesis import (
    Made,
    Synthesis,
    matched_pictures,
    noise_pictures,
    responding_pictures,
)
from imagewright.types import UserError, kind_of

Ranges = Literal["responding", "matched", "noise", "own"]
PICTURES, DRAWN = 256, 32
"""Images of a calibration: of an encoder's made-up ones, of a generator's own."""


def quantize(
    model: Annotated[str, tyro.conf.Positional],
    out: Path,
    bits: int = 8,
    activations: int = 8,
    ranges: Ranges | None = None,
    norms: q.Norms = "paired",
    buckets: int | None = None,
    steps: int | None = None,
    images: int | None = None,
    updates: int = 0,
    rate: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Store a model's weights in few bits, and let its layers see inputs of few bits; no data are needed.

    Ranges, statistics and training come from what the model makes itself: an encoder's pictures from its weights, a
    generator's own paths. The result is a model folder as any other.

    Args:
        model: run, model folder or shipped model: an encoder or a generator.
        out: model folder to write.
        bits: of a weight, 2 to 8; stored in 2, 4 or 8.
        activations: bits of a layer's inputs, 2 to 8; 0 leaves them floats.
        ranges: what clips the inputs. Of encoders: responding (pictures that the network responds to as strongly as it
            can, the default), matched (pictures of its batch norms' statistics), noise. Of generators: own (their own
            paths, the default), noise.
        norms: what mends the statistics: paired, reestimate (batch norms alone), none.
        buckets: of noise levels with ranges of their own, for generators; default 8.
        steps: of the sampler that makes a generator's paths; default its own.
        images: made for the calibration; default 256 of an encoder's pictures, 32 of a generator's paths.
        updates: of fine-tuning towards the float model.
        rate: of fine-tuning, by Adam; default 1e-5.
        seed: of the pictures, paths and updates.
        device: auto, cpu, cuda, mps.
    """
    file = fresh(Path(model), out)
    told = _settings(file, model, bits, activations, ranges, norms, buckets, steps, updates, rate, seed)
    file = replace(file, model=copy.deepcopy(file.model).to(pick_device(device)).requires_grad_(False))
    encoder = kind_of(file.model) == "encoder"
    ranges, images = ranges or ("responding" if encoder else "own"), images or (PICTURES if encoder else DRAWN)
    found = _encoder(file, told, ranges, images) if encoder else _generator(file, told, ranges, steps, images, device)
    origin = {**asdict(told), "ranges": ranges, "images": images, **found}
    save_model(out, replace(file, model=file.model.cpu(), origin={**file.origin, "quantization": origin}), half=True)
    _show(file, out)


def _settings(
    file: ModelFile,
    model: str,
    bits: int,
    activations: int,
    ranges: Ranges | None,
    norms: q.Norms,
    buckets: int | None,
    steps: int | None,
    updates: int,
    rate: float | None,
    seed: int,
) -> q.Quantization:
    """What is to be done. Raises UserError for options without effect, and for a model that this is not for."""
    kind = kind_of(file.model)
    if kind in ("codec", "autoencoder"):
        raise UserError(
            f"{model} is a model of kind {words(kind)}, which {KINDS[kind].what}; quantize encoders and generators"
        )
    encoder = kind == "encoder"
    allowed = ("responding", "matched", "noise") if encoder else ("own", "noise")
    if ranges is not None and ranges not in allowed:
        raise UserError(f"--ranges is {ranges}; of a model of kind {words(kind)} it is {' or '.join(allowed)}")
    for name, value in (("buckets", buckets), ("steps", steps)):
        if encoder and value is not None:
            raise UserError(f"--{name} has no effect on an encoder, which knows no noise levels")
    if buckets is not None and not activations:
        raise UserError("--buckets has no effect with --activations 0, which leaves inputs without ranges")
    if ranges is not None and not activations and norms == "none" and not updates:
        raise UserError(f"--ranges {ranges} has no effect where weights alone are rounded (--activations 0, no norms)")
    if isinstance(file.model, ImageText):
        raise UserError(f"{model} is an ImageText, of pictures and texts; quantize classifiers and generators")
    if activations == 1:
        raise UserError("--activations is 1; it must be 0, or 2 to 8")
    if rate is not None and not updates:
        raise UserError("--rate has no effect without --updates")
    given = {name: value for name, value in (("buckets", buckets), ("rate", rate)) if value is not None}
    told = q.Quantization(bits=bits, activation_bits=activations, norms=norms, updates=updates, seed=seed, **given)  # type: ignore[arg-type]
    q.require_quantizable(file.model, told)
    return told


def _encoder(file: ModelFile, told: q.Quantization, ranges: Ranges, count: int) -> dict[str, Any]:
    """Quantize the encoder in place; what its pictures reached."""
    noise = StepNoise(told.seed, device=next(file.model.parameters()).device)
    config, kinds = Synthesis(), {"matched": matched_pictures, "responding": matched_pictures}
    with bar("pictures", 2, "sets") as advance_to:
        if ranges == "noise":
            mending = clipping = noise_pictures(file.model, count, noise)
        else:
            mending = clipping = kinds[ranges](file.model, count, config, noise)
        advance_to(1)
        if ranges == "responding":
            clipping = responding_pictures(file.model, mending, count, config, noise)
        advance_to(2)
    for network, calls in q.recorded(file.model, lambda: _look(file, clipping)):
        others = q.recorded(file.model, lambda: _look(file, mending))
        norms = next(theirs for one, theirs in others if one is network)
        q.quantize(network, calls, told, norms=norms, loss=q.class_loss(clipping.labels))
    return {"response": clipping.response, "aim": clipping.aim}


def _look(file: ModelFile, made: Made) -> object:
    return file.model.encode(made.pictures)  # type: ignore[operator]  # an Encoder


def _generator(
    file: ModelFile, told: q.Quantization, ranges: Ranges, steps: int | None, count: int, device: str
) -> dict[str, Any]:
    """Quantize the generator's networks in place; how many evaluations calibrated them."""
    generator = make_generator(file, None, steps, (), device)
    with bar("paths", 1, "sets") as advance_to:
        found = q.recorded(file.model, lambda: generator.generate(count, seed=told.seed))
        advance_to(1)
    for network, calls in found:
        if ranges == "noise":
            noise = StepNoise(told.seed, device=calls[0][0].device)
            calls = [q.of_noise(call, noise) for call in calls]
        q.quantize(network, calls, told, loss=q.answer_loss)
    return {"evaluations": [sum(len(call[0]) for call in calls) for _, calls in found]}


def _show(file: ModelFile, out: Path) -> None:
    size, whole = (out / "model.safetensors").stat().st_size, 4 * count_parameters(file.model)
    rows = table("", "MB")
    rows.add_row("float, 32 bits", f"{whole / 1e6:.2f}")
    rows.add_row("quantized, on disk", f"{size / 1e6:.2f}")
    OUT.print(rows)
    say(f"written to {out}; measure it with: imagewright evaluate {out}")
