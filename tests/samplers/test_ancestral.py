"""Ancestral sampling: the law of one step, of all steps, what never changes, randomness, mistakes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.models.masked import MaskedTokenModel
from imagewright.models.masked_diffusion import LearnedMaskingModel, MaskedDiffusionModel
from imagewright.models.tokens import PixelCodec
from imagewright.noise import ImageNoise, StepNoise
from imagewright.oracles import ProductMixture
from imagewright.samplers import Ancestral
from imagewright.samplers.ancestral import fine_uniform, revealed
from imagewright.samplers.generator import ImageGenerator, sampler_from_json, sampler_to_json
from imagewright.types import UNCONDITIONAL, Condition, DataSpec, UserError

SIDE, VALUES = 2, 3
CODEC = PixelCodec(SIDE, 1, VALUES)
ALL = torch.tensor(list(itertools.product(range(VALUES), repeat=SIDE**2)))


def mixture() -> ProductMixture:
    torch.manual_seed(0)
    tables = torch.rand(3, SIDE**2, VALUES, dtype=torch.float64) ** 3
    return ProductMixture(torch.full((3,), 1 / 3, dtype=torch.float64), tables / tables.sum(2, keepdim=True))


class Exact(nn.Module):
    """The mixture's conditionals; keeps what it was shown. `powers`: of a learned schedule, which tilts them."""

    def __init__(self) -> None:
        super().__init__()
        self.mixture = mixture()
        self.powers: Tensor | None = None
        self.seen: list[Tensor] = []
        self.times: list[Tensor] = []

    def forward(self, tokens: Tensor, time: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        self.seen.append(tokens.clone())
        self.times.append(time)
        if self.powers is None:
            return self.mixture.conditionals(tokens)
        tables = self.mixture.tables * time[0].double() ** self.powers
        weights = self.mixture.weights.expand(len(tokens), -1)
        for n in range(tokens.shape[1]):
            seen = tokens[:, n] < VALUES
            own = self.mixture.tables[:, n, tokens[:, n].clamp(max=VALUES - 1)].T
            weights = weights * torch.where(seen[:, None], own, tables[:, n].sum(1))
        weights = weights / weights.sum(1, keepdim=True)
        rows: Tensor = tables / tables.sum(2, keepdim=True)
        return torch.einsum("nk,klv->nlv", weights, rows).log()


def model(learned: bool = False, **settings: Any) -> Any:
    if not learned:
        return MaskedDiffusionModel(Exact(), CODEC, **settings)
    made = LearnedMaskingModel(Exact(), CODEC, **settings)
    with torch.no_grad():
        made.raw_powers.copy_(torch.tensor([-0.5, 0.5, 2.0]))
    made.network.powers = made.powers.detach()  # type: ignore[union-attr]
    return made


def unknown(n: int) -> Tensor:
    return torch.full((n, SIDE**2), VALUES)


@pytest.mark.parametrize("reveal", [[0.3], [0.1, 0.0, 0.9], [1.0]])
def test_one_step_is_one_categorical_over_all_values_and_staying(reveal: list[float]) -> None:
    n = 20_000
    logits = torch.randn(1, 1, VALUES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    line = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    became = revealed(logits.expand(n, 1, -1), torch.ones(n, 1, dtype=torch.bool), line[:, None], torch.tensor(reveal))
    found = torch.bincount(became, minlength=VALUES + 1) / n
    values = torch.softmax(logits[0, 0], 0) * torch.tensor(reveal)
    expected = torch.cat([values, 1 - values.sum(0, keepdim=True)])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2 / n)
    assert float(expected.sum()) == pytest.approx(1, abs=1e-12)


def test_what_is_known_is_not_asked_for() -> None:
    known = torch.tensor([[True, False, True]])
    logits = torch.tensor([[[0.0, 9.0], [torch.nan, torch.nan], [9.0, 0.0]]]).double()
    became = revealed(logits, known, torch.full((1, 3), 0.5, dtype=torch.float64), torch.ones(1))
    assert became.tolist() == [1, 0]


@pytest.mark.parametrize("grid", ["uniform", "cosine"])
@pytest.mark.parametrize("learned", [False, True])
def test_revealed_tokens_never_change_and_none_stays_unknown(grid: str, learned: bool) -> None:
    drawer = model(learned, epsilon=0.3)
    tokens = unknown(50)
    tokens[:, 1] = torch.arange(50) % VALUES
    drawn = Ancestral(num_steps=6, grid=grid).fill(drawer, tokens, noise=StepNoise(0))
    states = [*drawer.network.seen, drawn]
    assert len(drawer.network.seen) == 6 and (drawn < VALUES).all()
    assert torch.equal(states[0], tokens)
    for before, after in itertools.pairwise(states):
        assert torch.equal(after[before < VALUES], before[before < VALUES])
    assert len({int((s == VALUES).sum()) for s in states}) == 7  # some at every step


def test_the_network_is_told_the_expected_share_of_unknown_tokens() -> None:
    drawer = model(schedule="cosine", epsilon=0.0)
    Ancestral(num_steps=4, grid="uniform").fill(drawer, unknown(2000), noise=StepNoise(0))
    told = torch.stack([t[0] for t in drawer.network.times])
    torch.testing.assert_close(told, torch.cos(torch.pi / 8 * torch.arange(4)))
    share = torch.stack([(s == VALUES).float().mean() for s in drawer.network.seen])
    torch.testing.assert_close(share, told, rtol=0, atol=0.02)


@pytest.mark.parametrize("case", ["linear", "cosine", "learned"])
def test_with_exact_answers_many_steps_draw_the_distribution(case: str) -> None:
    drawer = model(True) if case == "learned" else model(schedule=case)
    n = 20_000
    drawn = Ancestral(num_steps=100).fill(drawer, unknown(n), noise=StepNoise(0))
    counts = torch.bincount((drawn * VALUES ** torch.arange(3, -1, -1)).sum(1), minlength=len(ALL))
    p = drawer.network.mixture.log_prob(ALL).exp()
    chi = ((counts - n * p).square() / (n * p)).mean()
    assert float(chi) == pytest.approx(1, abs=0.6)


def test_few_steps_are_worse_than_many() -> None:
    drawer = model()

    def distance(steps: int) -> float:
        drawn = Ancestral(num_steps=steps).fill(drawer, unknown(20_000), noise=StepNoise(0))
        counts = torch.bincount((drawn * VALUES ** torch.arange(3, -1, -1)).sum(1), minlength=len(ALL))
        return float((counts / 20_000 - drawer.network.mixture.log_prob(ALL).exp()).abs().sum())

    assert distance(1) > 3 * distance(64)


def test_an_image_depends_on_its_seed_and_number_alone() -> None:
    generator = ImageGenerator(model(), DataSpec(name="t", resolution=2, channels=1), Ancestral(num_steps=5))
    assert generator.nfe == 5
    whole = generator.generate(9, seed=3, batch_size=9)
    assert (whole == generator.generate(9, seed=3, batch_size=2)).all()
    assert (whole[4:7] == generator.generate(3, seed=3, first=4)).all()
    assert len({w.tobytes() for w in whole}) > 2


def test_uniform_numbers_are_fine() -> None:
    drawn = fine_uniform(ImageNoise(0, range(3)), unknown(3))
    assert drawn.dtype == torch.float64 and ((drawn >= 0) & (drawn < 1)).all()
    assert (drawn * 2**24 % 1 > 0).all()


def test_the_usual_sampler_and_its_settings_are_kept() -> None:
    sampler = Ancestral(num_steps=7, grid="uniform")
    assert sampler_from_json(sampler_to_json(sampler)) == sampler and sampler.nfe == 7
    assert isinstance(ImageGenerator(model(), DataSpec(name="t", resolution=2, channels=1)).sampler, Ancestral)


def test_pictures_on_the_way() -> None:
    seen: list[tuple[Tensor, float]] = []
    Ancestral(num_steps=4)(
        model(), torch.zeros(3, 1), noise=StepNoise(0), on_step=lambda x, estimate, share: seen.append((x, share))
    )
    assert [x.shape for x, _ in seen] == [(3, 1, 2, 2)] * 4 and seen[0][1] == 1.0
    assert all(float(x.abs().max()) <= 1 for x, _ in seen)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"sampler.grid is 'cosin'; it must be one of cosine, uniform"):
        Ancestral(grid="cosin")
    with pytest.raises(UserError, match=r"sampler.num_steps is 0"):
        Ancestral(num_steps=0)
    masked = MaskedTokenModel(Exact(), CODEC)
    with pytest.raises(UserError, match="a MaskedTokenModel does not"):
        Ancestral().fill(masked, unknown(1), noise=StepNoise(0))
    with pytest.raises(ValueError, match="give it a noise source"):
        Ancestral().fill(model(), unknown(1))
    with pytest.raises(UserError, match=r"token 4 is none of the codec's"):
        Ancestral().fill(model(), unknown(1) + 1, noise=StepNoise(0))
