"""The sampler of analog bits: the released program's numbers, exact answers, DDIM as a special case, mistakes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from imagewright.models.bits import BitDenoiser
from imagewright.models.self_conditioned import SelfConditioned, carried
from imagewright.models.tokens import PixelCodec
from imagewright.noise import ImageNoise
from imagewright.oracles import GaussianMixture
from imagewright.paths.gammas import gamma, sigma_of
from imagewright.samplers import DDIM, BitDiffusion
from imagewright.samplers.generator import ImageGenerator
from imagewright.types import UNCONDITIONAL, Condition, DataSpec, UserError

F64 = torch.float64


class Waves:
    """Deterministic "noise": the k-th draw of [1, 2, 1, 2] is a cosine; in the released program's order of axes."""

    def __init__(self) -> None:
        self.k = 0

    def normal(self, like: Tensor) -> Tensor:
        self.k += 1
        wave = torch.cos(self.k * 1.7 + torch.arange(4, dtype=F64) * 0.9) * 1.3
        return wave.view(1, 1, 2, 2).permute(0, 3, 1, 2)


class Squashed(nn.Module):
    """A network of x and the estimate."""

    config = None

    def forward(self, x: Tensor, label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        image, estimate = x.chunk(2, dim=1)
        return torch.tanh(image * 0.4 - 0.3 * estimate + 0.2 * label[:, None, None, None] / 1000 - 0.1) * 1.3


class Told(nn.Module):
    """A denoiser that gives its network x_t and 1000 gamma, as a `BitDenoiser` of mse does; wide throughout."""

    sigma_min, sigma_max = 3e-4, 12_750.0

    def __init__(self) -> None:
        super().__init__()
        self.network = SelfConditioned(Squashed())

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        g = 1 / (1 + sigma**2)
        answer: Tensor = self.network(g.sqrt()[:, None, None, None] * x, 1000 * g, cond)
        return answer


@pytest.mark.parametrize(
    ("rule", "ahead", "official"),
    [
        ("ddim", 0.0, [0.049934196, -0.149035302, -0.169812613, 9.8626e-05]),
        ("ddim", 1.5, [0.105925453, 0.094812803, 0.093679411, 0.10310111]),
        ("ddpm", 0.0, [-0.029445411, -0.171431126, -0.108360304, 0.113100821]),
        ("ddpm", 1.5, [-0.069689121, -0.264052165, -0.181639482, 0.124986585]),
        ("ddpm-small", 0.0, [0.042392385, -0.020761175, 0.008035594, 0.106334415]),
        ("ddpm-small", 1.5, [0.121217225, 0.115310745, 0.104789139, 0.097567597]),
    ],
)
def test_it_draws_the_released_programs_numbers(rule: str, ahead: float, official: list[float]) -> None:
    """models/diffusion_utils.py, `generate`: five steps, self-conditioned, td = ahead; TensorFlow replaced by NumPy."""
    noise = Waves()
    sampler = BitDiffusion(num_steps=5, rule=rule, ahead=ahead)  # type: ignore[arg-type]
    x0 = sampler(carried(Told()), noise.normal(torch.empty(0)), noise=noise)
    assert x0.permute(0, 2, 3, 1).flatten().tolist() == pytest.approx(official, abs=2e-9)


def test_gamma_is_the_released_one() -> None:
    times = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    assert gamma("cosine", times).tolist() == pytest.approx(
        [0.9999999013532888, 0.7937337930878929, 6.165419642888424e-09], rel=1e-12
    )


class Exact(nn.Module):
    """Knows the bits."""

    def __init__(self, bits: Tensor) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor, label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return self.bits.expand(len(x), -1, -1, -1)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("rule", ["ddim", "ddpm", "ddpm-small"])
def test_who_knows_the_bits_draws_them_in_any_number_of_steps(steps: int, rule: str) -> None:
    codec = PixelCodec(2, 1)
    image = torch.tensor([[[[0, 85], [170, 255]]]]) / 127.5 - 1
    model = BitDenoiser(Exact(BitDenoiser(nn.Identity(), codec).encode(image)), codec)
    sampler = BitDiffusion(num_steps=steps, rule=rule, ahead=1.0)  # type: ignore[arg-type]
    drawn = ImageGenerator(model, DataSpec(name="t", resolution=2, channels=1), sampler).generate(2)
    assert drawn[..., 0].tolist() == [[[0, 85], [170, 255]]] * 2


def test_without_clipping_and_ahead_it_is_ddim() -> None:
    oracle = GaussianMixture(torch.tensor([0.5, -0.5], dtype=F64).view(2, 1, 1, 1), 0.2)
    times = 1 - torch.arange(6, dtype=F64) / 6
    z = torch.linspace(-2, 2, 9, dtype=F64).view(9, 1, 1, 1)
    sigmas = sigma_of(gamma("cosine", times))
    usual = DDIM(levels=tuple(sigmas.tolist()))(oracle, z)
    ours = BitDiffusion(num_steps=6, rule="ddim", clip=False)(oracle, z * (1 - gamma("cosine", times[:1])).sqrt())
    torch.testing.assert_close(ours, usual, rtol=1e-6, atol=1e-6)
    assert float(usual.std()) > 0.3


def test_the_state_runs_ahead_of_what_the_model_is_told() -> None:
    even, ahead = (BitDiffusion(num_steps=4, ahead=a).gammas(Told()) for a in (0.0, 1.0))
    assert [told for told, _ in even] == [told for told, _ in ahead]
    assert [after for _, after in ahead] == pytest.approx([*(after for _, after in even[1:]), even[-1][1]])


def test_noise_levels_that_a_denoiser_does_not_know_are_left_out() -> None:
    oracle = GaussianMixture(torch.zeros(1, 1, 1, 1, dtype=F64), 0.5)
    narrow = Narrow(oracle)
    BitDiffusion(num_steps=8)(narrow, torch.zeros(2, 1, 1, 1), noise=ImageNoise(0, range(2)))
    assert max(narrow.asked) == pytest.approx(80) and min(narrow.asked) >= 0.002


class Narrow:
    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self, oracle: GaussianMixture) -> None:
        self.oracle, self.asked = oracle, list[float]()

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        self.asked.append(float(sigma[0]))
        return self.oracle(x, sigma, cond)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="rule is 'heun'; it must be one of ddim, ddpm, ddpm-small"):
        BitDiffusion(rule="heun")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"sampler.ahead is -1"):
        BitDiffusion(ahead=-1.0)
    with pytest.raises(UserError, match="schedule is 'vp'; it must be one of cosine, linear"):
        BitDiffusion(schedule="vp")
    with pytest.raises(UserError, match=r"sampler.rule is 'ddpm'; a stochastic sampler needs a noise source"):
        BitDiffusion()(Told(), torch.zeros(1, 2, 1, 2))
