"""The whole and harmless files that hostile ones are made of, each made once: a model, a run, pairs, pictures, ..."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
from pickling import dumped, network
from PIL import Image
from safetensors.torch import save_file

from imagewright.data.couplings import Manifest, claim_folder, write_shard
from imagewright.interop.diffusers_out import write_diffusers
from imagewright.metrics.statistics import moments_of, save_moments
from imagewright.models.files import ModelFile, save_model
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.timesteps import TimestepPrecond
from imagewright.networks import ADMUNet, ADMUNetConfig, SongUNet, SongUNetConfig
from imagewright.recipes import RECIPES
from imagewright.samplers import SAMPLERS
from imagewright.training.experiment import run_experiment
from imagewright.types import DataSpec

os.environ["IMAGEWRIGHT_CACHE"] = ""  # nothing is kept outside the folder that is watched
CONFIG = SongUNetConfig(
    img_resolution=8,
    in_channels=1,
    out_channels=1,
    model_channels=8,
    channel_mult=(1,),
    num_blocks=1,
    attn_resolutions=(),
)
OFFICIAL = {
    "precond_class": "EDMPrecond",
    "img_resolution": 8,
    "img_channels": 1,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
}


def make_sources(folder: Path) -> None:
    """Write every kind of file that the program reads: into model, run, pairs, pictures, and files beside them."""
    torch.manual_seed(0)
    spec = DataSpec(name="digits", resolution=8, channels=1)
    model = EDMPrecond(SongUNet(CONFIG))
    sampler = {"class": "heun", "num_steps": 2}
    save_model(folder / "model", ModelFile(model=model, spec=spec, sampler=sampler))
    save_model(folder / "old", ModelFile(model=model, spec=spec, sampler=sampler))
    save_file(dict(model.state_dict()), folder / "old/model.safetensors")  # the description is in model.json alone
    weights = {k.replace("network.", "model."): v for k, v in model.state_dict().items()}
    torch.save(weights, folder / "weights.pt")
    torch.save(weights, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "config.json").write_text(json.dumps(OFFICIAL))
    arguments = {k: v for k, v in OFFICIAL.items() if k != "precond_class"}
    (folder / "network.pkl").write_bytes(dumped({"ema": network("EDMPrecond", weights, arguments)}))
    _make_diffusers(folder / "pipeline")
    _make_run(folder / "run")
    _make_pairs(folder / "pairs")
    save_moments(folder / "moments.npz", moments_of(np.random.default_rng(0).normal(size=(32, 4))))
    tuned = {"format": "imagewright-tuned/1", "sampler": sampler, "skips": []}
    (folder / "tuned.json").write_text(json.dumps(tuned))
    report = {"scores": {"fd_digits": 1.0}, "num_images": 10, "notes": []}
    scores = {"format": "imagewright-metrics/1", "reports": [{"sampler": sampler, "nfe": 3, "report": report}]}
    (folder / "metrics.json").write_text(json.dumps(scores))
    (folder / "pictures").mkdir()
    for i in range(3):
        (folder / f"pictures/{i}.png").write_bytes(png(8, 8, i))
    labels = {"labels": [[f"{i}.png", i] for i in range(3)], "classes": ["a", "b", "c"]}
    (folder / "pictures/dataset.json").write_text(json.dumps(labels))


def _make_diffusers(folder: Path) -> None:
    config = ADMUNetConfig(
        img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1,
        attn_resolutions=(), channels_per_head=None, groups=4, resampling="conv", adaptive_scale=False,
    )  # fmt: skip
    write_diffusers(folder, TimestepPrecond(ADMUNet(config)))


def _make_run(folder: Path) -> None:
    recipe = RECIPES["edm-digits"]()
    every = dict.fromkeys(("log_images", "snapshot_images", "checkpoint_images"), 16)
    training = dataclasses.replace(recipe.training, total_images=16, batch=16, **every)
    sampler = SAMPLERS["heun"](num_steps=2)
    run_experiment(dataclasses.replace(recipe, network=CONFIG, training=training, sampler=sampler), folder)
    for name in ("model.json", "model.safetensors"):
        (folder / name).unlink()  # the report of a run without a model draws nothing, and is quick


def _make_pairs(folder: Path) -> None:
    spec = DataSpec(name="digits", resolution=8, channels=1, num_classes=2)
    manifest = Manifest(n=4, seed=0, shard=4, batch=4, dtype="float32", spec=spec, origin={})
    claim_folder(folder, manifest)
    write_shard(folder, manifest, 0, torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 0, 1]))


def png(width: int, height: int, seed: int = 0) -> bytes:
    """A grey picture of noise."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()
