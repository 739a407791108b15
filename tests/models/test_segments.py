"""The multistep consistency model: boundaries, jumps to the lower end, and the sampler that draws from it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from imagewright.models.consistency import edm_teacher
from imagewright.models.description import describe
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.segments import MultistepConsistencyModel, segment_boundaries, segment_stops
from imagewright.oracles import GaussianOracle
from imagewright.samplers import Jumps
from imagewright.types import UNCONDITIONAL, Condition, FlowMap, UserError

STD = 0.5


class Scaled(nn.Module):
    """A network that answers w times its input."""

    def __init__(self, w: float = 0.3) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return self.w * x

    def describe(self) -> dict[str, object]:
        return {"class": "Scaled"}


class ExactSegments(MultistepConsistencyModel):
    """The exact estimate for N(0, STD^2): what DDIM needs to follow the flow to the segment's lower end."""

    def estimate(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        bounds = torch.tensor(self.boundaries, dtype=torch.float64)
        low = bounds[torch.searchsorted(bounds, sigma.double() * (1 - 1e-6)) - 1]
        ratio, scale = low / sigma, ((low**2 + STD**2) / (sigma**2 + STD**2)).sqrt()
        return ((scale - ratio) / (1 - ratio))[:, None, None, None].to(x) * x


def normal(n: int) -> Tensor:
    return torch.randn(n, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def levels(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 8])
def test_boundaries_are_even_in_the_angle(segments: int) -> None:
    bounds = segment_boundaries(segments, 80.0)
    assert bounds[0] == 0.0 and bounds[-1] == 80.0 and len(bounds) == segments + 1
    times = [math.atan(b) / math.atan(80.0) for b in bounds]
    assert times == pytest.approx([i / segments for i in range(segments + 1)], abs=1e-12)
    model = MultistepConsistencyModel(Scaled(), segments=segments)
    assert model.boundaries == bounds and model.stops == segment_stops(segments) == tuple(bounds[1:-1][::-1])


def test_four_segments_of_the_cosine_schedule() -> None:
    """t = 1/2 is SNR 1 for the whole schedule; cut off at 80, nearly."""
    assert segment_stops(4, 1e12) == pytest.approx((1 + math.sqrt(2), 1.0, math.sqrt(2) - 1))
    assert segment_stops(4, 80.0) == pytest.approx((2.351, 0.9876, 0.4106), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("segments", [1, 4, 8])
def test_a_jump_is_ddim_to_the_lower_end(segments: int, dtype: torch.dtype) -> None:
    model = MultistepConsistencyModel(Scaled(), segments=segments)
    for low, high in zip(model.boundaries, model.boundaries[1:], strict=False):
        for sigma in (high, low + 0.3 * (high - low), low * (1 + 1e-3) + 1e-3):
            at, to = torch.full((3,), sigma, dtype=dtype), torch.full((3,), low, dtype=dtype)
            x = (sigma * normal(3)).to(dtype)
            with torch.no_grad():
                want = model.estimate(x, at) * (1 - low / sigma) + low / sigma * x
                torch.testing.assert_close(model(x, at, to), want)
    assert isinstance(model, FlowMap)


def test_one_segment_is_a_consistency_model_without_a_wrapper() -> None:
    model, denoiser = MultistepConsistencyModel(Scaled(), segments=1), EDMPrecond(Scaled())
    x, sigma = normal(3), levels(0.002, 1.0, 80.0)
    assert torch.equal(model(x, sigma, torch.zeros(3, dtype=torch.float64)), denoiser(x, sigma))


def test_another_destination_is_refused() -> None:
    model = MultistepConsistencyModel(Scaled(), segments=4)
    x, stops = normal(1), model.stops
    for sigma, to in [(80.0, 0.0), (80.0, stops[1]), (stops[0], stops[0]), (0.2, stops[2]), (0.2, 0.002)]:
        with pytest.raises(UserError, match="this model only goes to the lower ends of its 4 segments"):
            model(x, levels(sigma), levels(to))
    with pytest.raises(ValueError, match=rf"sigma_to is 0 from {stops[0]:g};.*with sigmas {stops[0]:g} {stops[1]:g}"):
        model(normal(2), levels(0.2, stops[0]), levels(0.0, 0.0))


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jumps_follow_the_flow_in_as_many_evaluations_as_segments(segments: int, dtype: torch.dtype) -> None:
    model = ExactSegments(Scaled(), segments=segments)
    sampler = Jumps(sigmas=model.stops, gamma=0.0, clip=False)
    latents = normal(5)
    flow = GaussianOracle(torch.zeros(1, 4, 4, dtype=torch.float64), std=STD).flow_map()
    want = flow(80 * latents, torch.full((5,), 80.0), torch.zeros(5))
    torch.testing.assert_close(
        sampler(model, latents.to(dtype)), want.to(dtype), rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=1e-6
    )
    assert sampler.nfe == segments


def test_a_sampler_of_other_segments_is_told_the_right_ones() -> None:
    model = MultistepConsistencyModel(Scaled(), segments=2)
    with pytest.raises(UserError, match=r"lower ends of its 2 segments \(sampler jumps with sigmas 0.98"):
        Jumps(sigmas=segment_stops(4))(model, normal(2))


def test_from_denoiser_copies_the_network() -> None:
    teacher = EDMPrecond(Scaled(), 0.01, 50.0, 0.4, "angle").eval().requires_grad_(False)
    student = MultistepConsistencyModel.from_denoiser(teacher, 3)
    assert (student.sigma_min, student.sigma_max, student.sigma_data, student.noise_label, student.segments) == (
        0.01, 50.0, 0.4, "angle", 3,
    )  # fmt: skip
    assert student.training and student.network.w == teacher.network.w and student.network.w.requires_grad
    assert student.network.w.data_ptr() != teacher.network.w.data_ptr() and not teacher.network.w.requires_grad
    with pytest.raises(UserError, match="the teacher is a MultistepConsistencyModel"):
        edm_teacher(student)


def test_it_describes_all_that_it_was_made_with() -> None:
    said = describe(MultistepConsistencyModel(Scaled(), 0.01, 50.0, 0.4, "angle", 3))
    network = said.pop("network")
    assert said == {
        "class": "MultistepConsistencyModel", "sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.4,
        "noise_label": "angle", "segments": 3,
    }  # fmt: skip
    assert network == {"class": "Scaled"}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"segments": 0}, "segments is 0; it must be a whole number of at least 1"),
        ({"segments": 2.0}, "segments is 2.0"),
        ({"sigma_max": math.inf}, "sigma_max is inf; segments need one that is positive and finite"),
    ],
)
def test_bad_settings_are_told(settings: dict[str, float], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        MultistepConsistencyModel(Scaled(), **settings)  # type: ignore[arg-type]
