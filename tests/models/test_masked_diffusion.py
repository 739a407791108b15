"""The bound of masked diffusion against exact likelihoods, by enumeration of all masks and quadrature over time."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imagewright.data import ImageSet
from imagewright.metrics.bits import measure_bits
from imagewright.models.files import ModelFile, load_model, save_model
from imagewright.models.masked_diffusion import LearnedMaskingModel, MaskedDiffusionModel
from imagewright.models.tokens import PixelCodec
from imagewright.networks import TokenTransformer, TokenTransformerConfig
from imagewright.noise import StepNoise
from imagewright.oracles import ProductMixture
from imagewright.samplers import MaskedDecoding
from imagewright.types import UNCONDITIONAL, Condition, DataSpec, LikelihoodModel, UserError

LENGTH, VALUES = 4, 3
CODEC = PixelCodec(2, 1, VALUES)
ALL = torch.tensor(list(itertools.product(range(VALUES), repeat=LENGTH)))
MASKS = torch.tensor(list(itertools.product([False, True], repeat=LENGTH)))
SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "linear"},
    {"schedule": "cosine"},
    {"schedule": "polynomial", "power": 3.0},
    {"schedule": "geometric"},
]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s["schedule"])


def mixture() -> ProductMixture:
    torch.manual_seed(0)
    tables = torch.rand(3, LENGTH, VALUES, dtype=torch.float64) ** 3
    return ProductMixture(torch.full((3,), 1 / 3, dtype=torch.float64), tables / tables.sum(2, keepdim=True))


class Exact(nn.Module):
    """The mixture's conditionals, tilted by t ** powers where masking depends on the value."""

    def __init__(self, powers: Tensor | None = None) -> None:
        super().__init__()
        self.mixture, self.powers = mixture(), powers

    def forward(self, tokens: Tensor, time: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        if self.powers is None:
            return self.mixture.conditionals(tokens)
        tilted = self.mixture.tables[None] * time.double()[:, None, None, None] ** self.powers  # [N, K, L, V]
        weights = self.mixture.weights.expand(len(tokens), -1)
        for n in range(LENGTH):
            seen = tokens[:, n, None] < VALUES
            own = self.mixture.tables[:, n, tokens[:, n].clamp(max=VALUES - 1)].T
            weights = weights * torch.where(seen, own, tilted[:, :, n].sum(2))
        weights = weights / weights.sum(1, keepdim=True)
        return torch.einsum("nk,nklv->nlv", weights, tilted / tilted.sum(3, keepdim=True)).log()


class Fixed(nn.Module):
    """The same logits [L, V] always."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.double())

    def forward(self, tokens: Tensor, time: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return self.logits.expand(len(tokens), -1, -1)


def nodes(low: float, high: float = 1.0, count: int = 200) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes in (low, high), and weights of sum 1."""
    x, w = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy((high - low) * (x + 1) / 2 + low), torch.from_numpy(w / 2)


@torch.no_grad()
def expected(model: Any, x: Tensor, t: Tensor, weights: Tensor, steps: int | None = None) -> dict[str, Tensor]:
    """Means of the bound's parts for one sequence, over times and all masks."""
    n, m = len(t), len(MASKS)
    tokens, masks = x.expand(n * m, -1), MASKS.repeat(n, 1)
    times = t.repeat_interleave(m)
    hidden = model.hidden(tokens, times).expand(-1, LENGTH)
    p = torch.where(masks, hidden, 1 - hidden).prod(1).view(n, m)
    found = model.bound(tokens, masks, times, UNCONDITIONAL, steps)
    parts = {name: getattr(found, name).view(n, m) for name in ("diffusion", "reconstruction", "prior")}
    means = {name: ((part * p).sum(1) * weights).sum() for name, part in parts.items()}
    return means | {"all": sum(means.values(), torch.zeros(()))}


PICKED = ALL[[0, 13, 37, 55, 80]]


@each_schedule
def test_with_exact_answers_the_bound_is_the_likelihood_for_every_schedule(schedule: dict[str, Any]) -> None:
    model = MaskedDiffusionModel(Exact(), CODEC, epsilon=0.0, **schedule)
    exact = -mixture().log_prob(PICKED)
    found = torch.stack([expected(model, x, *nodes(0, count=400))["diffusion"] for x in PICKED])
    # The geometric schedule leaves 1e-5 of the tokens out of account.
    torch.testing.assert_close(found, exact, rtol=5e-5 if schedule["schedule"] == "geometric" else 1e-9, atol=0)


@each_schedule
def test_squeezed_it_is_a_little_above(schedule: dict[str, Any]) -> None:
    model = MaskedDiffusionModel(Exact(), CODEC, **schedule)
    p = mixture().log_prob(ALL)
    bounds = torch.stack([expected(model, x, *nodes(0))["all"] for x in ALL])
    excess = float((p.exp() * (bounds + p)).sum())
    assert 0 < excess < 2.1 * 1e-4 * LENGTH * math.log(VALUES)


@each_schedule
def test_uniform_answers_cost_all_but_the_visible_end(schedule: dict[str, Any]) -> None:
    model = MaskedDiffusionModel(Fixed(torch.zeros(LENGTH, VALUES)), CODEC, **schedule)
    found = expected(model, PICKED[0], *nodes(0, count=400))
    bits = {name: float(value) / (LENGTH * math.log(2)) for name, value in found.items()}
    visible = float(model.path.alpha(torch.ones(())))
    assert bits["diffusion"] + bits["reconstruction"] == pytest.approx((1 - visible) * math.log2(VALUES), rel=1e-8)
    assert bits["all"] == pytest.approx(math.log2(VALUES), rel=1e-8)
    if schedule["schedule"] != "geometric":
        assert visible == pytest.approx(1e-4) and bits["reconstruction"] == pytest.approx(1e-4 * math.log2(VALUES))


def test_bytes_with_uniform_answers_cost_eight_bits() -> None:
    model = MaskedDiffusionModel(Fixed(torch.zeros(64, 256)), PixelCodec(8, 1))
    images = ImageSet.of(np.random.default_rng(0).integers(256, size=(400, 8, 8, 1), dtype=np.uint8))
    assert isinstance(model, LikelihoodModel)
    report = measure_bits(model, DataSpec(name="t", resolution=8, channels=1), images, split="all")
    assert report.kind == "bound" and report.stderr is not None and report.stderr < 0.05
    assert report.bpd == pytest.approx(8, abs=4 * report.stderr)


@each_schedule
def test_doubling_the_steps_tightens_the_discrete_bound(schedule: dict[str, Any]) -> None:
    model = MaskedDiffusionModel(Exact(), CODEC, epsilon=0.0, **schedule)
    p = mixture().log_prob(ALL).exp()
    entropy = -float(torch.special.xlogy(p, p).sum())
    mean = []
    for steps in (1, 2, 4, 8, 16, 32):
        t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        even = torch.full_like(t, 1 / steps)
        bounds = torch.stack([expected(model, x, t, even, steps)["all"] for x in ALL])
        mean.append(float((p * bounds).sum()))
    assert all(after < before for before, after in itertools.pairwise(mean)) and mean[-1] > entropy
    if schedule["schedule"] != "geometric":  # whose reveals crowd in a tenth of the time
        assert mean[-1] - entropy < 0.1 * (mean[0] - entropy)


def test_the_drawn_bound_is_unbiased_in_continuous_and_discrete_time() -> None:
    model = MaskedDiffusionModel(Exact(), CODEC)
    x = PICKED[2]
    for steps in (None, 4):
        t = torch.arange(1, 5, dtype=torch.float64) / 4
        grid = nodes(0) if steps is None else (t, torch.full_like(t, 0.25))
        exact = float(expected(model, x, *grid, steps)["all"])
        drawn = model.nll(x.expand(40_000, -1), noise=StepNoise(0), steps=steps)
        assert drawn.dtype == torch.float64
        assert float(drawn.mean()) == pytest.approx(exact, abs=4 * float(drawn.std()) / 200)


# --- learned schedules ----------------------------------------------------------------------------------------


def learned(network: nn.Module, powers: Tensor, **settings: Any) -> LearnedMaskingModel:
    model = LearnedMaskingModel(network, CODEC, **settings).double()
    with torch.no_grad():
        model.raw_powers.copy_(powers.double().expm1().log())
    torch.testing.assert_close(model.powers.detach(), powers.double())
    return model


@pytest.mark.parametrize("powers", [[1.0, 1.0, 1.0], [1.0, 2.0, 4.0], [3.0, 1.0, 2.0]])
def test_with_exact_answers_the_learned_bound_is_the_likelihood_whatever_the_powers(powers: list[float]) -> None:
    w = torch.tensor(powers, dtype=torch.float64)
    model = learned(Exact(w), w, epsilon=0.0, first=1e-7)
    found = torch.stack([expected(model, x, *nodes(1e-7))["all"] for x in PICKED])
    # The network is told a float32 time, and the reconstruction takes 1e-7 ln V.
    torch.testing.assert_close(found, -mixture().log_prob(PICKED), rtol=3e-6, atol=0)


def test_equal_powers_are_the_polynomial_schedule() -> None:
    power, first = 2.5, 1e-3
    fixed = Fixed(torch.randn(LENGTH, VALUES, generator=torch.Generator().manual_seed(0)))
    ours = learned(fixed, torch.full((VALUES,), power), epsilon=0.0, first=first)
    theirs = MaskedDiffusionModel(fixed, CODEC, "polynomial", power, 0.0)
    n = len(MASKS)
    tokens = ALL[torch.arange(n) * 5]
    t = torch.linspace(0.01, 1, n, dtype=torch.float64)
    torch.testing.assert_close(ours.hidden(tokens, t).detach(), theirs.hidden(tokens, t).expand(-1, LENGTH))
    found, plain = ours.bound(tokens, MASKS, t), theirs.bound(tokens, MASKS, t)
    # Were the terms without a logarithm not to cancel, the two would differ by them.
    torch.testing.assert_close(found.diffusion, (1 - first) * plain.diffusion)
    uniform = first**power * LENGTH * math.log(VALUES)
    torch.testing.assert_close(found.reconstruction, torch.full_like(t, uniform))
    s = torch.tensor(0.4, dtype=torch.float64)
    shown = ours.reveal(t[-1], s).detach()
    torch.testing.assert_close(shown, theirs.reveal(t[-1], s).expand(VALUES))


def test_the_loss_and_its_ends_are_the_papers_formulas() -> None:
    w = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    logits = torch.randn(LENGTH, VALUES, generator=torch.Generator().manual_seed(0)).double()
    model = learned(Fixed(logits), w, epsilon=1e-4, first=1e-2)
    x, mask = torch.tensor([[2, 0, 1, 2]]), torch.tensor([[True, True, False, True]])
    t = torch.full((1,), 0.3, dtype=torch.float64)
    mu, t1 = torch.softmax(logits, 1), 1e-2
    diffusion = reconstruction = 0.0
    for n in range(LENGTH):
        v = int(x[0, n])
        if bool(mask[0, n]):
            one = torch.eye(VALUES, dtype=torch.float64)[v] * (1 + mu[n, v].log()) - mu[n]
            diffusion += float((-w / 0.3 * one).sum()) * (1 - t1)
        spread = torch.logsumexp(w * math.log(t1), 0)
        reconstruction += float(-(1 - 1e-4) * t1 ** w[v] * (w[v] * math.log(t1) - spread))
    with torch.no_grad():
        found = model.bound(x, mask, t)
    assert float(found.diffusion) == pytest.approx(diffusion, rel=1e-12)
    assert float(found.reconstruction) == pytest.approx(reconstruction, rel=1e-12)
    assert float(found.prior) == pytest.approx(1e-4 * LENGTH * math.log(VALUES), rel=1e-12)


def test_a_learned_schedule_comes_back_from_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = TokenTransformerConfig(values=VALUES, length=LENGTH, width=8, depth=1, heads=1)
    spec = DataSpec(name="t", resolution=2, channels=1)
    for model in (
        LearnedMaskingModel(TokenTransformer(config), CODEC, epsilon=1e-3, first=1e-2),
        MaskedDiffusionModel(TokenTransformer(config), CODEC, "polynomial", 2.0, 1e-3),
    ):
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
        save_model(tmp_path / type(model).__name__, ModelFile(model=model.eval(), spec=spec))
        again: Any = load_model(tmp_path / type(model).__name__).model
        assert type(again) is type(model) and again.describe() == model.describe()
        drawn = [m.nll(PICKED, noise=StepNoise(0)) for m in (model, again.eval())]
        torch.testing.assert_close(*drawn, rtol=0, atol=0)


def test_mistakes_are_named() -> None:
    model = MaskedDiffusionModel(Exact(), CODEC)
    with pytest.raises(UserError, match="token 3 is none of the codec's; they are 0 to 2"):
        model.nll(torch.full((1, LENGTH), 3), noise=StepNoise(0))
    with pytest.raises(ValueError, match="give it a noise source"):
        model.nll(PICKED)
    with pytest.raises(UserError, match=r"first is 0.0; it must lie in \(0, 1\)"):
        LearnedMaskingModel(Exact(), CODEC, first=0.0)
    with pytest.raises(UserError, match="known in continuous time only"):
        LearnedMaskingModel(Exact(), CODEC).nll(PICKED, noise=StepNoise(0), steps=4)
    with pytest.raises(UserError, match="schedule is 'lin'"):
        MaskedDiffusionModel(Exact(), CODEC, "lin")
    config = TokenTransformerConfig(values=5, length=LENGTH, width=8, depth=1, heads=1)
    with pytest.raises(UserError, match="the network knows 4 tokens of 5 values; the codec has 4 of 3"):
        MaskedDiffusionModel(TokenTransformer(config), CODEC)


def test_a_share_of_unknown_tokens_has_its_time() -> None:
    network = Fixed(torch.zeros(4, 3))
    model = LearnedMaskingModel(network, PixelCodec(2, 1, 3), epsilon=1e-3)
    with torch.no_grad():
        model.raw_powers.copy_(torch.tensor([-1.0, 0.5, 3.0]))
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    share = (1 - 1e-3) * (t[:, None] ** model.powers.detach()).mean(1)
    torch.testing.assert_close(model.told_of_share(share), t)
    plain = MaskedDiffusionModel(network, PixelCodec(2, 1, 3))
    torch.testing.assert_close(plain.told_of_share(share), share)


def test_guidance_needs_a_class_that_was_hidden() -> None:
    model = MaskedDiffusionModel(Fixed(torch.zeros(4, 3)), PixelCodec(2, 1, 3))
    with pytest.raises(UserError, match="guidance is 2"):
        MaskedDecoding(guidance=2).fill(model, torch.full((1, 4), 3), noise=StepNoise(0))
