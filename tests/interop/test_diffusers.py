"""Folders that diffusers wrote are read, and folders that we write are loaded by diffusers alone: the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ConsistencyModelPipeline, DDIMPipeline, DiffusionPipeline, UNet2DModel
from diffusers.schedulers import CMStochasticIterativeScheduler, DDIMScheduler, DDPMScheduler

from imagewright.interop.diffusers_out import write_diffusers
from imagewright.interop.reading import read_official
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.timesteps import TimestepPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.samplers.ddim import DDIM
from imagewright.types import Condition, UserError

DDPM = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "norm_eps": 1e-6,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "attention_head_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
CM = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "attn_norm_num_groups": 4,
    "attention_head_dim": 8,
    "num_class_embeds": 5,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
MIXED = {
    **CM,
    "num_class_embeds": None,
    "down_block_types": ("AttnDownBlock2D",) * 2,
    "up_block_types": ("AttnUpBlock2D",) * 2,
}


def unet(settings: dict) -> UNet2DModel:
    torch.manual_seed(0)
    network = UNet2DModel(**settings).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def folder(tmp_path: Path, settings: dict, scheduler) -> tuple[UNet2DModel, Path]:
    network = unet(settings)
    kind = ConsistencyModelPipeline if isinstance(scheduler, CMStochasticIterativeScheduler) else DDIMPipeline
    kind(unet=network, scheduler=scheduler).save_pretrained(tmp_path / "theirs")
    return network, tmp_path / "theirs"


@pytest.mark.parametrize("settings", [DDPM, CM, MIXED], ids=["ddpm", "cm", "mixed"])
def test_networks_agree(tmp_path, settings):
    network, path = folder(tmp_path, settings, DDPMScheduler())
    found = read_official(path)
    assert isinstance(found.model, TimestepPrecond) and found.kind == "diffusers"
    assert (found.spec.resolution, found.spec.channels) == (16, 3)
    assert found.spec.num_classes == (settings.get("num_class_embeds") or 0)
    x, steps, label = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0]), torch.tensor([1, 4])
    told = label if found.spec.num_classes else None
    with torch.no_grad():
        theirs = network(x, steps, class_labels=told).sample
        ours = found.model.network(x, steps, Condition(label=told))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, "scaled_linear"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "cosine"),
        ({"num_train_timesteps": 200, "prediction_type": "v_prediction"}, "linear"),
    ],
)
def test_steps_are_the_schedulers(tmp_path, scheduler, expected):
    theirs = DDPMScheduler(**scheduler)
    _, path = folder(tmp_path, DDPM, theirs)
    model = read_official(path).model
    assert model.schedule == expected
    torch.testing.assert_close(1 / (1 + model.levels**2), theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_a_ddim_pipeline_of_ours_draws_the_same_picture(tmp_path):
    _, path = folder(tmp_path, DDPM, DDIMScheduler())
    model = read_official(path).model
    write_diffusers(tmp_path / "ours", model)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "ours")
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, DDIMPipeline)
    drawn = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=5, output_type="np").images
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    levels = model.levels[pipeline.scheduler.timesteps]
    # Their x_t is alpha_t times our x, also at the first step, where they take pure noise for it.
    start = noise * (1 + levels[0] ** 2).sqrt() / levels[0]
    ours = DDIM(levels=tuple(levels.tolist()))(model, start)
    np.testing.assert_allclose(drawn, (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), rtol=0, atol=2e-4)


def test_a_consistency_pipeline_of_ours_draws_the_same_picture(tmp_path):
    _, path = folder(tmp_path, CM, CMStochasticIterativeScheduler())
    model = read_official(path).model
    assert isinstance(model, ConsistencyModel)
    write_diffusers(tmp_path / "ours", model)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "ours")
    pipeline.set_progress_bar_config(disable=True)
    latents, label = torch.randn(2, 3, 16, 16), torch.tensor([1, 4])
    drawn = pipeline(2, [1, 4], num_inference_steps=1, latents=latents.clone(), output_type="pt").images
    with torch.no_grad():
        ours = model.start(80.0 * latents, torch.tensor(80.0), Condition(label=label))
    torch.testing.assert_close(drawn, (ours.clamp(-1, 1) / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_the_weights_come_back_as_they_went(tmp_path):
    network, path = folder(tmp_path, CM, CMStochasticIterativeScheduler())
    write_diffusers(tmp_path / "ours", read_official(path).model)
    again = UNet2DModel.from_pretrained(tmp_path / "ours/unet").state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(again[name], tensor), name
    same = read_official(tmp_path / "ours/unet").model  # the network's folder alone, with the scheduler beside it
    for a, b in zip(same.parameters(), read_official(path).model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_old_names_of_attention_and_torch_files_are_read(tmp_path):
    network, path = folder(tmp_path, DDPM, DDPMScheduler())
    old = {}
    for name, tensor in network.state_dict().items():
        for new, was in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(new, was)
        old[name] = tensor
    (path / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save(old, path / "unet/diffusion_pytorch_model.bin")
    model = read_official(path).model
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.network(x, torch.tensor([5.0])), network(x, 5).sample, rtol=0, atol=5e-5)


def test_what_has_no_equal_is_refused(tmp_path):
    _, classes = folder(tmp_path / "classes", CM, DDPMScheduler())
    with pytest.raises(UserError, match="its DDIMPipeline has no classes"):
        write_diffusers(tmp_path / "x", read_official(classes).model)
    song = SongUNet(
        SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,))
    )
    with pytest.raises(UserError, match="no equal of an EDMPrecond around a SongUNet"):
        write_diffusers(tmp_path / "x", EDMPrecond(song))
    _, path = folder(tmp_path, DDPM, DDPMScheduler())
    model = read_official(path).model
    model.network.config = type(model.network.config)(**{**model.network.config.to_json(), "label_scale": 2.0})
    with pytest.raises(UserError, match=r"label_scale is 2\.0; diffusers' is 1\.0"):
        write_diffusers(tmp_path / "x", model)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"act_fn": "gelu"}, "act_fn 'gelu'; read is 'silu'"),
        ({"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "a block 'SkipDownBlock2D'; read are"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "attends at other levels"),
        ({"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]}, "in several ways"),
        ({"block_out_channels": [8]}, "lists of one length"),
        ({"block_out_channels": [8, 24]}, "does not fit|of the wrong shape"),
        ({"_class_name": "UNet2DConditionModel"}, "of a 'UNet2DConditionModel'; read is UNet2DModel"),
        ({"sample_size": [16, 8]}, "no whole numbers"),
    ],
)
def test_other_networks_are_refused(tmp_path, changes, sentence):
    _, path = folder(tmp_path, DDPM, DDPMScheduler())
    config = json.loads((path / "unet/config.json").read_text())
    (path / "unet/config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=sentence):
        read_official(path)
