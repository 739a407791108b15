"""Zero-shot editing: projections against the paper's A and Omega, the loop on exact flow maps, arcs between noises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from imagewright.noise import ImageNoise
from imagewright.oracles import GaussianOracle
from imagewright.samplers import MultistepConsistency
from imagewright.samplers.editing import (
    LUMA,
    BlockMeans,
    Editing,
    Known,
    Luma,
    Nothing,
    Pixels,
    between,
    denoised,
    editing_levels,
)
from imagewright.types import UNCONDITIONAL, Condition, UserError

LOW, HIGH, STD = 0.002, 80.0, 0.5
SHAPE = (3, 4, 4)
KEEP = torch.tensor([[True, False, True, False]]).expand(4, 4)
PROJECTIONS: list[Known] = [Pixels(KEEP), Luma(), BlockMeans(2), BlockMeans(4), Nothing()]
NAMES = ["pixels", "luma", "blocks of 2", "blocks of 4", "nothing"]


def normal(n: int = 3, seed: int = 1) -> Tensor:
    return ImageNoise(seed, range(n)).normal(torch.empty(n, *SHAPE, dtype=torch.float64))


class Recorder:
    """The exact flow map of N(0, STD^2) on [LOW, HIGH], which notes every call."""

    sigma_min, sigma_max = LOW, HIGH

    def __init__(self) -> None:
        self.exact = GaussianOracle(torch.zeros(SHAPE, dtype=torch.float64), std=STD).flow_map()
        self.calls: list[tuple[Tensor, float, Condition]] = []

    def __call__(self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        assert sigma.shape == sigma_to.shape == (len(x),) and bool((sigma_to == 0).all())
        self.calls.append((x.clone(), float(sigma[0]), cond))
        answer: Tensor = self.exact(x, sigma, sigma_to, cond)
        return answer


class Fresh:
    """Noise that remembers what it gave."""

    def __init__(self) -> None:
        self.source, self.given = ImageNoise(0, range(3)), []

    def normal(self, like: Tensor) -> Tensor:
        self.given.append(self.source.normal(like))
        return self.given[-1]

    def uniform(self, like: Tensor) -> Tensor:
        raise AssertionError


def orthogonal(first: np.ndarray) -> Tensor:
    """An orthogonal matrix whose first row is along a vector."""
    basis = np.eye(len(first))
    basis[:, 0] = first
    q = np.linalg.qr(basis)[0]
    return torch.from_numpy(q.T * np.sign(q[:, 0] @ first))


@pytest.mark.parametrize("known", PROJECTIONS, ids=NAMES)
def test_projections_are_orthogonal(known: Known) -> None:
    x, y = normal(), normal(seed=2)
    torch.testing.assert_close(known(known(x)), known(x))
    torch.testing.assert_close((known(x) * y).sum(), (x * known(y)).sum())
    torch.testing.assert_close(known(2 * x + y), 2 * known(x) + known(y))


def test_luma_is_the_first_axis_of_the_papers_colour_basis() -> None:
    a = orthogonal(np.array(LUMA))
    torch.testing.assert_close(a @ a.T, torch.eye(3, dtype=torch.float64))
    omega = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)[:, None, None]
    x, y = normal(), normal(seed=2)
    in_basis = lambda v: torch.einsum("ij,njhw->nihw", a, v)  # noqa: E731
    papers = torch.einsum("ij,nihw->njhw", a, in_basis(y) * (1 - omega) + in_basis(x) * omega)
    torch.testing.assert_close(x + Luma()(y - x), papers)


def test_block_means_are_the_first_axis_of_the_papers_block_basis() -> None:
    k = 2
    a = orthogonal(np.ones(k * k))
    omega = torch.ones(k * k, dtype=torch.float64)
    omega[0] = 0
    x, y = normal(), normal(seed=2)

    def blocks(v: Tensor) -> Tensor:
        return torch.einsum("ij,nbj->nbi", a, torch.nn.functional.unfold(v.flatten(0, 1)[:, None], k, stride=k).mT)

    mixed = torch.einsum("ij,nbi->nbj", a, blocks(y) * (1 - omega) + blocks(x) * omega)
    papers = torch.nn.functional.fold(mixed.mT, SHAPE[1:], k, stride=k).reshape(x.shape)
    torch.testing.assert_close(x + BlockMeans(k)(y - x), papers)


@pytest.mark.parametrize("known", PROJECTIONS, ids=NAMES)
def test_what_is_known_comes_out_as_it_was(known: Known) -> None:
    picture = normal().clamp(-1, 1)
    edited = Editing(sigmas=(80.0, 3.0, 0.2))(Recorder(), picture, known, noise=Fresh())
    torch.testing.assert_close(known(edited), known(picture), rtol=0, atol=1e-12)
    rest = edited - known(edited)
    assert not torch.allclose(rest, picture - known(picture), atol=0.1)


def test_the_loop_is_algorithm_four() -> None:
    flow_map, noise, seen = Recorder(), Fresh(), []
    picture, known, cond = normal(), Luma(), Condition(label=torch.tensor([0, 1, 2]))
    sigmas = (80.0, 3.0, 0.2)
    edited = Editing(sigmas=sigmas, clip=False)(
        flow_map, picture, known, cond, noise=noise, on_step=lambda *step: seen.append(step)
    )
    y = known(picture)
    x = y + 80.0 * noise.given[0]
    for k, (sigma, fresh) in enumerate(zip(sigmas, noise.given, strict=True)):
        noisy = x if k == 0 else x + math.sqrt(sigma**2 - LOW**2) * fresh
        torch.testing.assert_close(flow_map.calls[k][0], noisy)
        x = noisy * STD / math.hypot(sigma, STD)
        x = x + known(y - x)
    torch.testing.assert_close(edited, x)
    assert [s for _, s, _ in flow_map.calls] == list(sigmas) and all(c is cond for _, _, c in flow_map.calls)
    assert [s for _, _, s in seen] == list(sigmas) and torch.equal(seen[-1][1], edited)
    assert Editing(sigmas=sigmas).nfe == 3


def test_answers_are_clipped_before_the_known_part_is_put_back() -> None:
    flow_map, picture = Recorder(), 3 * normal()
    edited = Editing(sigmas=(80.0,))(flow_map, picture, Pixels(KEEP), noise=Fresh())
    assert float(edited[..., ~KEEP].abs().max()) <= 1 < float(edited[..., KEEP].abs().max())


def test_strokes_start_from_the_drawing_itself() -> None:
    flow_map, noise, drawing = Recorder(), Fresh(), normal()
    Editing(sigmas=(0.7, 0.3))(flow_map, drawing, Nothing(), noise=noise)
    torch.testing.assert_close(flow_map.calls[0][0], drawing + 0.7 * noise.given[0])


def test_nothing_known_and_all_the_noise_is_multistep_sampling() -> None:
    """From an empty picture at the highest level: the same evaluations as the multistep sampler's."""
    ours, theirs = Fresh(), Fresh()
    edited = Editing(sigmas=(80.0, 2.0), clip=False)(
        Recorder(), torch.zeros(3, *SHAPE, dtype=torch.float64), Nothing(), noise=ours
    )
    latents = theirs.normal(torch.empty(3, *SHAPE, dtype=torch.float64))
    torch.testing.assert_close(
        edited, MultistepConsistency(sigmas=(2.0,), clip=False)(Recorder(), latents, noise=theirs)
    )


def test_denoising_is_one_jump_from_the_pictures_level() -> None:
    flow_map, noisy = Recorder(), 2 * normal()
    clean = denoised(flow_map, noisy, 0.7, clip=False)
    torch.testing.assert_close(clean, noisy * STD / math.hypot(0.7, STD))
    assert [s for _, s, _ in flow_map.calls] == [0.7]
    assert float(denoised(flow_map, 9 * noisy, 0.7).abs().max()) == 1


def test_arcs_keep_a_normals_length() -> None:
    first, second = normal(2)
    shares = torch.linspace(0, 1, 7)
    arc = between(first, second, shares)
    torch.testing.assert_close(arc[0], first)
    torch.testing.assert_close(arc[-1], second)
    angles = [torch.acos(torch.dot(a.flatten(), first.flatten()) / (a.norm() * first.norm())) for a in arc[1:]]
    whole = between(first / first.norm(), second / second.norm(), shares)
    torch.testing.assert_close(whole.flatten(1).norm(dim=1), torch.ones(7, dtype=torch.float64))
    turned = torch.acos((whole.flatten(1) @ (first / first.norm()).flatten()).clamp(-1, 1))
    torch.testing.assert_close(turned, shares.double() * angles[-1], rtol=0, atol=1e-6)
    straight = 0.5 * first + 0.5 * second
    assert float(straight.norm()) < 0.85 * float(arc[3].norm())
    torch.testing.assert_close(between(first, first, shares), first.expand(7, *SHAPE))
    for bad in (-first, torch.zeros_like(first)):
        with pytest.raises(ValueError, match="there is no one arc"):
            between(first, bad, shares)


def test_levels_go_from_the_highest_towards_sigma_min() -> None:
    levels = editing_levels(Recorder(), 5)
    assert len(levels) == 5 and levels[0] == HIGH and levels[-1] > LOW
    assert levels == pytest.approx([(HIGH ** (1 / 7) + k / 5 * (LOW ** (1 / 7) - HIGH ** (1 / 7))) ** 7
                                    for k in range(5)])  # fmt: skip
    assert editing_levels(Recorder(), 1, 0.7) == (0.7,)
    assert Editing(sigmas=editing_levels(Recorder(), 20)).nfe == 20


def test_bad_settings_get_one_sentence() -> None:
    for sigmas, sentence in (
        ((), "editing needs at least one noise level"),
        ((1.0, -1.0), "the levels must be positive and strictly decreasing"),
        ((1.0, 2.0), "the levels must be positive and strictly decreasing"),
        ((1.0, 1.0), "the levels must be positive and strictly decreasing"),
    ):
        with pytest.raises(UserError, match=sentence):
            Editing(sigmas=sigmas)
    for outside in ((81.0, 1.0), (1.0, LOW)):
        with pytest.raises(UserError, match=r"every level must lie between 0\.002 and 80\.0"):
            Editing(sigmas=outside)(Recorder(), normal(), Luma(), noise=Fresh())
    with pytest.raises(UserError, match=r"noise level is 90\.0; the model knows 0\.002 to 80\.0"):
        denoised(Recorder(), normal(), 90.0)
    with pytest.raises(UserError, match="steps is 0; editing needs at least 1"):
        editing_levels(Recorder(), 0)
    with pytest.raises(UserError, match=r"to start from is 81\.0; it must lie between 0\.002"):
        editing_levels(Recorder(), 3, 81.0)
