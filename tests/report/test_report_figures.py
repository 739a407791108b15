"""Figures: which curves there are, one jump, words for samplers, and SVG that lives inside a page."""

from __future__ import annotations

import re

import numpy as np
import pytest
from torch import Tensor, nn

from imagewright.report.collect import Measure, Trajectory
from imagewright.report.figures import (
    Curve,
    loss_curves,
    loss_figure,
    quality_curves,
    rate_curves,
    rate_figure,
    sampler_words,
    trajectory_picture,
    trajectory_sheets,
)
from imagewright.report.markup import el, number
from imagewright.samplers import Heun, MultistepConsistency
from imagewright.samplers.generator import ImageGenerator, sampler_to_json
from imagewright.types import UNCONDITIONAL, Condition, DataSpec

SPEC = DataSpec(name="grey", resolution=4, channels=1, num_classes=3)


class Shrink(nn.Module):
    """The denoiser of N(0, 0.25)."""

    sigma_min, sigma_max = 0.002, 80.0

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return x * (0.25 / (0.25 + sigma**2)).view(-1, 1, 1, 1)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


class Jump(nn.Module):
    """A flow map whose picture is the noise itself, clipped."""

    kind = "flow_map"
    sigma_min, sigma_max = 0.002, 80.0

    def forward(self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return x.clamp(-1, 1)


def measure(score: str, value: float, nfe: int, **sampler: object) -> Measure:
    report = {"scores": {"precision": 1.0, score: value}, "num_images": 10}
    return Measure(sampler={"class": "heun", **sampler}, nfe=nfe, seconds=2.0, report=report)


def test_trajectory_picture_ends_in_the_images() -> None:
    generator = ImageGenerator(Shrink(), SPEC, Heun(num_steps=5))
    picture = trajectory_picture(generator, seed=3, labels=[0, 1, 2, 0, 1])
    small = picture[::16, ::16]
    assert picture.shape == (16 * (2 * 21 + 4), 16 * 26, 1)
    images = generator.generate(4, labels=[0, 1, 2, 0], seed=3)
    np.testing.assert_array_equal(small[1:5, 21:25], images[0])
    np.testing.assert_array_equal(small[16:20, 21:25], images[3])


def test_trajectory_picture_thins_long_ways() -> None:
    generator = ImageGenerator(Shrink(), SPEC, Heun(num_steps=40))
    assert trajectory_picture(generator, most_steps=6).shape[1] == 16 * (6 * 5 + 1)


def test_one_jump_is_noise_and_image() -> None:
    generator = ImageGenerator(Jump(), SPEC, MultistepConsistency())
    small = trajectory_picture(generator, labels=[2])[::16, ::16]
    assert small.shape == (6, 11, 1)
    np.testing.assert_array_equal(small[1:5, 1:5], small[1:5, 6:10])


def test_two_jumps_are_two_columns_twice() -> None:
    x = np.zeros((2, 3, 4, 4, 1), dtype=np.uint8)
    sheets = trajectory_sheets(Trajectory(x=x, estimate=x + 7, sigmas=(80.0, 1.0)))
    assert [s.shape for s in sheets] == [(6, 4, 4, 1)] * 2
    assert (sheets[0] == 0).sum() == (sheets[1] == 7).sum() == x.size


def test_loss_curves_by_part_and_noise_level() -> None:
    log = [
        {"step": 1, "images": 8, "a/loss": 2.0, "a/loss_sigma_2_to_inf": 1.0, "b/loss": -1.0, "a/lr": 1.0},
        {
            "step": 2,
            "images": 16,
            "a/loss": float("nan"),
            "a/loss_sigma_0_to_0.1": 3.0,
            "a/loss_sigma_0.1_to_0.5": 3.0,
        },
    ]
    curves = loss_curves(log)
    assert list(curves) == ["a", "b"]
    assert [c.label for c in curves["a"]] == ["all noise levels", "σ < 0.1", "0.1 ≤ σ < 0.5", "σ ≥ 2"]
    assert curves["a"][0] == Curve(label="all noise levels", x=(8,), y=(2.0,))
    assert loss_figure("b", curves["b"], "p").count("<svg ") == 1  # a negative loss has no logarithm


def test_rates_are_drawn_for_every_part() -> None:
    log = [{"images": 8, "a/lr": 0.5, "b/lr": 1.0}, {"images": 16, "a/lr": 1.0, "a/loss": 2.0}]
    curves = rate_curves(log)
    assert curves == [Curve(label="a", x=(8, 16), y=(0.5, 1.0)), Curve(label="b", x=(8,), y=(1.0,))]
    assert rate_figure(curves, "p").count("<svg ") == 1
    assert rate_curves([{"images": 8, "a/loss": 1.0}]) == []


def test_quality_curves_join_steps_of_one_sampler() -> None:
    teacher = [measure("fd_digits", 3.0, 35, num_steps=18), measure("fd_digits", 9.0, 9, num_steps=5)]
    churned = [measure("fd_digits", 2.0, 35, num_steps=18, S_churn=40.0)]
    student = [measure("fid", 4.0, 1)]
    curves = quality_curves([("t", teacher + churned), ("s", student)])
    assert curves["fd_digits"] == [
        Curve(label="t: heun", x=[9, 35], y=[9.0, 3.0]),
        Curve(label="t: heun, S_churn 40.0", x=[35], y=[2.0]),
    ]
    assert curves["fid"] == [Curve(label="s: heun", x=[1], y=[4.0])]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (sampler_to_json(Heun(num_steps=9)), "heun, 9 steps"),
        (sampler_to_json(Heun(S_churn=40, S_max=50.0)), "heun, 18 steps, S_churn 40, S_max 50.0"),
        (sampler_to_json(MultistepConsistency()), "multistep-consistency"),
        (sampler_to_json(MultistepConsistency(sigmas=(0.8,))), "multistep-consistency, sigmas [0.8]"),
        ({}, "images from files"),
        ({"class": "unheard-of", "a": 1}, "unheard-of, a 1"),
    ],
)
def test_sampler_words(settings: dict[str, object], words: str) -> None:
    assert sampler_words(settings) == words


def test_svg_follows_the_page_and_repeats() -> None:
    curves = [Curve(label="a<b", x=(1, 2, 3), y=(3.0, 2.0, 1.0))]
    one, again, other = (loss_figure("x<y", curves, prefix) for prefix in ("p", "p", "q"))
    assert one == again
    assert "xmlns" not in one
    assert "a&lt;b" in one
    assert "x&lt;y" in one
    assert "currentColor" in one
    assert "#0b0c0d" not in one
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_markup_escapes_text_and_attributes() -> None:
    assert el("a", "<&", el("b", "x"), None, class_='"', aria_label="l", title=None) == (
        '<a class="&quot;" aria-label="l">&lt;&amp;<b>x</b></a>'
    )


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "–"), (0, "0"), (0.5, "0.500"), (3.14159, "3.14"), (812.3, "812"), (12345.6, "12,346")],
)
def test_numbers(value: float | None, words: str) -> None:
    assert number(value) == words


def test_images_per_second_needs_seconds() -> None:
    assert measure("fid", 1.0, 1).images_per_second == 5
    report = {"scores": {}, "num_images": 4}
    files = Measure(sampler={}, nfe=0, seconds=0.0, report=report)
    assert files.images_per_second is None
    assert files.distance is None
