"""`imagewright export RUN`: a run's model on its own, to keep, share or ship, or in another library's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from imagewright.cli.command import run
from imagewright.cli.console import say
from imagewright.interop.card import write_card
from imagewright.interop.diffusers_out import write_diffusers
from imagewright.interop.graphs import write_onnx, write_program
from imagewright.models.files import has_model, save_model
from imagewright.networks.quantized import is_quantized
from imagewright.pretrained import find_model, folder_of
from imagewright.types import UserError

EPILOG = """examples:
  imagewright export runs/edm-emoji64-32 --out models/emoji --half
  imagewright export runs/cd-digits --out digits.onnx --format onnx
  imagewright export models/cd --out pipelines/cd --format diffusers
"""
Format = Literal["model", "diffusers", "onnx", "torch"]


def export_command(
    model: Annotated[str, tyro.conf.Positional], out: Path, half: bool = False, format: Format = "model"
) -> None:
    """Copy the averaged weights of a run, with their description, into a model folder, or into another format.

    Args:
        model: run folder, model folder or shipped model.
        out: the folder to write, which must not hold a model yet; for onnx and torch a file.
        half: store the weights in 16 bits (they are read back as 32); format model.
        format: model (two files and a card); diffusers, a pipeline folder; onnx or torch (torch.export), a graph of one
            call of a denoiser or one-step generator.
    """
    if half and format != "model":
        raise UserError(f"--half stores a model folder in 16 bits; it has no effect with --format {format}")
    if format in ("model", "diffusers"):
        _require_free(out)
    elif out.exists():
        raise UserError(f"{out} is there already; choose another --out")
    file = find_model(model)
    if file.space is not None and format != "model":
        raise UserError(f"{model} lives in an autoencoder's latents; --format {format} has no place for it, model has")
    if is_quantized(file.model) and format != "model":
        raise UserError(f"{model} is quantized, which --format {format} has no place for; export what it was made of")
    match format:
        case "model":
            save_model(out, file, half=half)
            scores = folder_of(model) / "metrics.json"
            write_card(out, scores if not half else None)
            said = f"{(out / 'model.safetensors').stat().st_size / 1e6:.2f} MB"
        case "diffusers":
            write_diffusers(out, file.model)
            said = "a pipeline that diffusers loads by itself"
        case "onnx":
            said = f"onnxruntime answers as the model does, within {write_onnx(out, file.model, file.spec):.1g}"
        case "torch":
            write_program(out, file.model, file.spec)
            said = "a program that torch.export.load reads"
    say(f"written to {out} ({said})")


def _require_free(out: Path) -> None:
    if has_model(out) or (out / "model_index.json").exists():
        raise UserError(f"{out} already holds a model; choose another --out")


COMMANDS: Mapping[str, Callable[..., None]] = {"": export_command}


def main(args: Sequence[str]) -> None:
    """Parse and copy."""
    run(export_command, args, "imagewright export", EPILOG)
