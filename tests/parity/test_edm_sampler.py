"""Our samplers against numbers of the published ones (Karras et al. 2022, generate.py).

data/edm_sampler.json holds the rule that makes the inputs, and says from which commit the outputs are;
data/edm_sampler.npz holds the outputs. Bars: 5e-4 absolute where a float32 network is in between (its rounding alone
moves outputs by about 5e-5), 1e-8 of the value for the float64 denoiser, 1e-10 for noise levels.
"""

import json
import math
import zlib
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from imagewright.interop.official import from_official
from imagewright.oracles import GaussianMixture
from imagewright.samplers import Ablation, Heun
from imagewright.types import UNCONDITIONAL, Condition

DATA = Path(__file__).parent / "data"
NETS = json.loads((DATA / "edm_nets.json").read_text())["configs"]
REFERENCE = json.loads((DATA / "edm_sampler.json").read_text())
RUNS = REFERENCE["edm_sampler"]["runs"]
ABLATION = REFERENCE["ablation_sampler"]


def normal(key: str, shape: list[int]) -> np.ndarray:
    """N(key, shape) of the rule, before it is rounded to float32."""
    generator = np.random.Generator(np.random.PCG64(seed=zlib.crc32(key.encode())))
    return np.asarray(generator.standard_normal(shape))


@cache
def output(name: str) -> np.ndarray:
    with np.load(DATA / "edm_sampler.npz") as outputs:
        return outputs[name]


class Recorder:
    """A denoiser that notes the noise level of every call, in order."""

    def __init__(self, denoiser):
        self.denoiser = denoiser
        self.sigma_min, self.sigma_max = denoiser.sigma_min, denoiser.sigma_max
        self.calls = []

    def round_sigma(self, sigma):
        return self.denoiser.round_sigma(sigma)

    def __call__(self, x, sigma, cond=UNCONDITIONAL):
        assert (sigma == sigma[0]).all()
        self.calls.append(float(sigma[0]))
        return self.denoiser(x, sigma, cond)


# --- the deterministic sampler on a network -------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_samples_of_a_network_agree(name):
    run, inputs = RUNS[name], REFERENCE["edm_sampler"]["inputs"]
    entry = NETS[run["net"]]
    state = {
        key: normal(key, shape).astype(np.float32) * np.float32(mul) + np.float32(add)
        for key, shape, mul, add in entry["params"]
        if mul is not None
    }
    model = Recorder(from_official(state, kind="edm", config=entry["config"]))
    latents = torch.from_numpy(normal(**inputs["latents"]).astype(np.float32))
    drawn = Heun(**run["kwargs"])(model, latents, Condition(label=torch.tensor(inputs["labels"])))
    np.testing.assert_allclose(model.calls, run["sigma_of_each_network_call"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(drawn, output(name), rtol=0, atol=5e-4)


# --- every combination of table 1 on an exact denoiser ----------------------------------------------------------

AXES = ABLATION["axes"]
GIVEN = ABLATION["inputs"]
TABLE = torch.logspace(-2.5, 2, 300, dtype=torch.float64)


class TableMixture(GaussianMixture):
    """A mixture that only answers at the levels of a table, as iDDPM's networks do."""

    sigma_min, sigma_max = float(TABLE[0]), float(TABLE[-1])

    def round_sigma(self, sigma):
        return TABLE[(sigma[..., None] - TABLE).abs().argmin(-1)]


class Given:
    """Noise that was written down."""

    def __init__(self, draws):
        self.draws = iter(torch.from_numpy(draws))

    def normal(self, like):
        draw = next(self.draws)
        assert draw.shape == like.shape
        return draw


@pytest.mark.parametrize("table", [False, True], ids=AXES["denoiser"])
@pytest.mark.parametrize(
    ("i", "grid", "j", "schedule"),
    [(i, g, j, s) for (i, g), (j, s) in product(enumerate(AXES["discretization"]), enumerate(AXES["schedule"]))],
)
def test_every_combination_agrees(table, i, grid, j, schedule):
    mixture = TableMixture if table else GaussianMixture
    denoiser = mixture(torch.from_numpy(normal(**ABLATION["denoiser"]["means"])), ABLATION["denoiser"]["std"])
    latents = torch.from_numpy(normal(**GIVEN["latents"]))
    want = output(ABLATION["output"])[int(table), i, j]
    for k, scaling in enumerate(AXES["scaling"]):
        for m, (solver, alpha) in enumerate(AXES["solver, alpha"]):
            for n, churned in enumerate(AXES["churn"]):
                churn = ABLATION["churn"] if churned else {}
                steps = {"num_steps": ABLATION["num_steps"], "solver": solver, "alpha": alpha}
                sampler = Ablation(grid=grid, schedule=schedule, scaling=scaling, **steps, **churn)
                drawn = sampler(denoiser, latents, noise=Given(normal(**GIVEN["churn_noise"])))
                np.testing.assert_allclose(drawn.flatten(), want[k, m, n], rtol=1e-8, atol=1e-8, err_msg=repr(sampler))


@pytest.mark.parametrize("table", [False, True], ids=AXES["denoiser"])
@pytest.mark.parametrize("churned", AXES["churn"])
def test_heun_is_the_published_combination(table, churned):
    mixture = TableMixture if table else GaussianMixture
    denoiser = mixture(torch.from_numpy(normal(**ABLATION["denoiser"]["means"])), ABLATION["denoiser"]["std"])
    sampler = Heun(num_steps=ABLATION["num_steps"], **(ABLATION["churn"] if churned else {}))
    drawn = sampler(denoiser, torch.from_numpy(normal(**GIVEN["latents"])), noise=Given(normal(**GIVEN["churn_noise"])))
    want = output(ABLATION["output"])[int(table), 0, 0, 0, 0, int(churned)]
    assert math.isfinite(want.sum())
    np.testing.assert_allclose(drawn.flatten(), want, rtol=1e-10, atol=1e-10)
