"""EDM2's network and OpenAI's against numbers of the published programs, read in through `from_official`.

data/official_nets.json holds the rule that makes weights and inputs, and says from which commits the outputs are (of
guided-diffusion, consistency_models and CTM the U-Net alone, of EDM2 the denoiser and its uncertainty);
data/official_nets.npz holds the outputs. Bar: 5e-5 absolute.
"""

from __future__ import annotations

import json
import zlib
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from imagewright.interop.official import from_official
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.description import build, describe
from imagewright.models.edm2 import EDM2Precond
from imagewright.models.preconditioning import EDMPrecond, iDDPMPrecond
from imagewright.models.timesteps import TimestepPrecond, noise_levels
from imagewright.models.trajectory import TrajectoryModel
from imagewright.networks.edm2_unet import MPConv
from imagewright.types import Condition, UserError

DATA = Path(__file__).parent / "data"
REFERENCE = json.loads((DATA / "official_nets.json").read_text())
NETWORKS, INPUTS = REFERENCE["networks"], REFERENCE["inputs"]


def normal(key: str, shape: list[int]) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(seed=zlib.crc32(key.encode())))
    return np.asarray(generator.standard_normal(shape)).astype(np.float32)


def official_state(name: str) -> dict[str, np.ndarray]:
    return {
        key: np.asarray(normal(key, shape) * np.float32(mul) + np.float32(add), np.float32)
        for key, shape, mul, add in NETWORKS[name]["params"]
    }


def read(name: str, **changes):
    entry = NETWORKS[name]
    return from_official(official_state(name), kind=entry["kind"], config=entry["config"] | changes)


def outputs(name: str) -> np.ndarray:
    with np.load(DATA / "official_nets.npz") as arrays:
        return arrays[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_the_ones_that_were_used_and_the_model_can_be_described(name):
    digest = sha256(b"".join(v.tobytes() for v in official_state(name).values())).hexdigest()
    assert digest == NETWORKS[name]["weights_sha256"]
    model = read(name)
    assert sum(p.numel() for p in model.parameters()) == NETWORKS[name]["num_parameters"]
    assert not model.training
    again = build(json.loads(json.dumps(describe(model))))
    again.load_state_dict(model.state_dict())
    assert describe(again) == describe(model)


@pytest.mark.parametrize("name", [n for n, e in NETWORKS.items() if e["kind"] == "edm2"])
def test_edm2_agrees(name):
    config = NETWORKS[name]["config"]
    model = read(name)
    assert isinstance(model, EDM2Precond) and (model.sigma_min, model.sigma_max) == (0.002, 80)
    side, factors = config["img_resolution"], np.asarray(INPUTS["factors"], np.float32)[:, None, None, None]
    x = torch.from_numpy(normal("x", [3, config["img_channels"], side, side]) * factors)
    label = torch.tensor(INPUTS["labels_edm2"]) if config["label_dim"] else None
    sigma = torch.tensor(INPUTS["sigma"])
    with torch.no_grad():
        np.testing.assert_allclose(model(x, sigma, Condition(label=label)), outputs(f"{name}_D"), rtol=0, atol=5e-5)
        np.testing.assert_allclose(model.log_variance(sigma), outputs(f"{name}_u"), rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", [n for n, e in NETWORKS.items() if e["kind"] != "edm2"])
def test_openai_networks_agree(name):
    entry = NETWORKS[name]
    model, config, kind = read(name), entry["config"], entry["kind"]
    x = torch.from_numpy(normal("x", [3, 3, config["image_size"], config["image_size"]]))
    # The programs hand 1000 times our label of the noise level to the network, but where that is a step already.
    scale = 1.0 if kind == "guided-diffusion" else 1000.0
    steps = torch.tensor(INPUTS["steps"].get(kind, INPUTS["steps"]["other"])) / scale
    cond = Condition(
        label=torch.tensor(INPUTS["labels"]) if config.get("num_classes") else None,
        destination=torch.tensor(INPUTS["to"]) / scale if kind == "ctm" else None,
    )
    with torch.no_grad():
        np.testing.assert_allclose(model.network(x, steps, cond), outputs(f"{name}_F"), rtol=0, atol=5e-5)


def test_each_kind_is_the_model_that_it_is_sampled_as():
    assert isinstance(read("consistency"), ConsistencyModel)
    edm = read("consistency", training_mode="edm")
    assert type(edm) is EDMPrecond and (edm.sigma_min, edm.sigma_max) == (0.002, 80)
    assert isinstance(read("ctm"), TrajectoryModel)
    guided = read("guided_new")
    assert isinstance(guided, TimestepPrecond) and guided.schedule == "cosine"
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 3.0])
    assert guided(x, sigma).shape == x.shape  # the variances are left out


@pytest.mark.parametrize("name", [n for n, e in NETWORKS.items() if e["kind"] != "edm2"])
def test_openai_is_whichever_it_is(name):
    model = from_official(official_state(name), kind="openai", config=NETWORKS[name]["config"])
    assert type(model) is type(read(name))


def test_steps_have_the_published_noise_levels():
    for name, alpha_bar in REFERENCE["alpha_bar"].items():
        schedule, steps = name.split("-")
        n = int(steps)
        sigma = noise_levels(schedule, n, 0.1 / n, 20 / n)[[0, 1, n // 2, n - 2, n - 1]]
        np.testing.assert_allclose(1 / (1 + sigma**2), alpha_bar, rtol=1e-10)


def test_the_cosine_steps_are_iddpms():
    """EDM's wrapper for such networks, which was compared with its own program, gives the same answers."""
    guided = read("guided_new")
    edm = iDDPMPrecond(guided.network)
    x, sigma = torch.randn(4, 3, 16, 16), torch.tensor([0.02, 0.5, 3.0, 40.0])
    with torch.no_grad():
        torch.testing.assert_close(guided(x, sigma), edm(x, sigma), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["v", "sample"])
def test_predictions_are_conversions_of_each_other(prediction):
    """A network that knows x0 answers in every way, and the denoiser is x0."""
    x0, eps, sigma = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), 0.7

    class Knows(torch.nn.Module):
        def forward(self, x, label, cond):
            alpha = (1 + sigma**2) ** -0.5
            return alpha * eps - alpha * sigma * x0 if prediction == "v" else x0

    found = TimestepPrecond(Knows(), prediction=prediction)(x0 + sigma * eps, torch.tensor(sigma))
    torch.testing.assert_close(found, x0)


def test_training_writes_unit_weights_back():
    model = read("edm2_uncond").train()
    before = {k: v.clone() for k, v in model.network.state_dict().items()}
    model(torch.randn(1, 4, 8, 8), torch.tensor([1.0])).square().sum().backward()
    for name, module in model.network.named_modules():
        if isinstance(module, MPConv):
            rms = module.weight.detach().square().flatten(1).mean(1).sqrt()
            torch.testing.assert_close(rms, torch.ones_like(rms), rtol=0, atol=1e-3)
            assert not torch.equal(module.weight, before[f"{name}.weight"])
    model.eval().requires_grad_(False)
    kept = model.network.out_conv.weight.clone()
    model.train()(torch.randn(1, 4, 8, 8), torch.tensor([1.0]))  # a frozen one is left as it is
    assert torch.equal(model.network.out_conv.weight, kept)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("edm2_cond", {"precond_class": "EDMPrecond"}, "EDM2's only one is 'Precond'"),
        ("edm2_cond", {"chanel_mult": [1]}, "'chanel_mult', unknown to EDM2.*did you mean 'channel_mult'"),
        ("edm2_cond", {"resample_filter": [1, 3, 3, 1]}, r"every EDM2 network has \[1, 1\]"),
        ("edm2_cond", {"num_blocks": 2}, "missing: 'unet.enc"),
        ("edm2_cond", {"augment_dim": 9}, "'augment_dim', unknown"),
        ("edm2_cond", {"channel_mult": []}, "channel_mult"),
        ("edm2_cond", {"clip_act": -1.0}, "clip_act"),
        ("guided_new", {"noise_schedule": "sqrt"}, "noise_schedule 'sqrt'"),
        ("guided_new", {"channel_mult": "a,b"}, "channel_mult 'a,b'; it must be numbers"),
        ("guided_new", {"channel_mult": "", "image_size": 48}, "config needs channel_mult"),
        ("guided_new", {"attention_resolutions": "x"}, "attention_resolutions 'x'"),
        ("guided_new", {"conv_resample": False}, "conv_resample False; read is True"),
        ("guided_new", {"num_channels": 40}, "model_channels|groups"),
        ("guided_new", {"num_channels": "32"}, "num_channels is '32'; it must be a whole number"),
        ("guided_new", {"training_mode": "edm"}, "'training_mode', unknown to guided-diffusion"),
        ("consistency", {"training_mode": "gan"}, "training_mode 'gan', which is unknown"),
        ("consistency", {"learn_sigma": True}, "out.2.weight"),
    ],
)
def test_bad_configurations_are_refused(name, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        read(name, **changes)
