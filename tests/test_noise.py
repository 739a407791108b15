"""Randomness that is handed in: what a draw depends on, and that it has the distribution it claims."""

import math
import os
import signal

import pytest
import torch

from imagewright.networks import EDM2UNet, EDM2UNetConfig
from imagewright.noise import MANY, BatchNoise, ImageNoise, StepNoise, derive_seed, dropout, kept

LIKE = torch.empty(6, 3, 5)
DRAWS = pytest.mark.parametrize("draw", ["normal", "uniform"])


def draws(noise, like=LIKE, draw="normal", times=1):
    return torch.stack([getattr(noise, draw)(like) for _ in range(times)], dim=1)


# --- per image ------------------------------------------------------------------------------------------------


@DRAWS
@pytest.mark.parametrize("rows", [[0], [2, 3, 4], [5, 0, 3]])
def test_an_image_sees_the_same_numbers_in_any_batch(draw, rows):
    whole = draws(ImageNoise(4, range(6)), draw=draw, times=3)
    part = draws(ImageNoise(4, rows), LIKE[: len(rows)], draw=draw, times=3)
    assert torch.equal(part, whole[rows])


@DRAWS
def test_images_seeds_streams_and_draws_differ(draw):
    every = [
        draws(ImageNoise(seed, range(3), stream), LIKE[:3], draw=draw, times=2).flatten(0, 1)
        for seed in (0, 1)
        for stream in (0, 1)
    ]
    numbers = torch.cat(every).flatten(1)  # seeds x streams x images x draws rows
    assert len(numbers) == 24
    assert len({tuple(row.tolist()) for row in numbers}) == 24
    correlation = torch.corrcoef(draws(ImageNoise(0, range(8)), torch.empty(8, 2000), draw=draw)[:, 0])
    assert (correlation - torch.eye(8)).abs().max() < 0.1  # 4.5 standard errors


def test_same_key_same_numbers():
    assert torch.equal(draws(ImageNoise(3, [7, 9], 1), LIKE[:2]), draws(ImageNoise(3, [7, 9], 1), LIKE[:2]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_sees_the_same_numbers(dtype):
    want = draws(ImageNoise(0, range(6)))
    assert torch.equal(draws(ImageNoise(0, range(6)), LIKE.to(dtype)), want.to(dtype))


def test_as_many_rows_as_images():
    with pytest.raises(ValueError, match="noise for 2 images asked to fill 3"):
        ImageNoise(0, [0, 1]).normal(torch.empty(3, 4))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_draws_with_threads_of_its_own(monkeypatch):
    """Its parent's are not there, and it would wait for them."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    like = torch.empty(4, MANY // 4)
    whole = ImageNoise(4, range(4)).normal(like).numpy().tobytes()
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        os._exit(ImageNoise(4, range(4)).normal(like).numpy().tobytes() != whole)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- distributions --------------------------------------------------------------------------------------------

SOURCES = pytest.mark.parametrize(
    "make",
    [lambda: ImageNoise(1, range(10)), lambda: StepNoise(1, 2), lambda: BatchNoise(1, 2, range(10), 10)],
    ids=["image", "step", "batch"],
)


@SOURCES
def test_normal_moments(make):
    z = make().normal(torch.empty(10, 10_000, dtype=torch.float64)).flatten()
    error = 1 / math.sqrt(len(z))
    assert float(z.mean()) == pytest.approx(0, abs=4 * error)
    assert float((z**2).mean()) == pytest.approx(1, abs=4 * math.sqrt(2) * error)
    assert float((z**3).mean()) == pytest.approx(0, abs=4 * math.sqrt(15) * error)
    assert float((z**4).mean()) == pytest.approx(3, abs=4 * math.sqrt(96) * error)


@SOURCES
def test_uniform_moments(make):
    u = make().uniform(torch.empty(10, 10_000, dtype=torch.float64)).flatten()
    error = 1 / math.sqrt(len(u))
    assert float(u.mean()) == pytest.approx(1 / 2, abs=4 * math.sqrt(1 / 12) * error)
    assert float((u**2).mean()) == pytest.approx(1 / 3, abs=4 * math.sqrt(4 / 45) * error)
    assert torch.histc(u.float(), 10, 0, 1).min() > 9_600  # of 10,000, 4 standard deviations
    assert float(u.min()) >= 0
    assert float(u.max()) < 1


@SOURCES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_uniform_stays_below_one_in_every_dtype(make, dtype):
    u = make().uniform(torch.empty(10, 5_000, dtype=dtype))
    assert u.dtype == dtype
    assert float(u.min()) >= 0
    assert 0.99 < float(u.max()) < 1


# --- per step -------------------------------------------------------------------------------------------------


def test_step_noise_depends_on_its_key_alone():
    first = draws(StepNoise(0, 5, 1), times=3)
    torch.manual_seed(123)
    assert torch.equal(draws(StepNoise(0, 5, 1), times=3), first)
    others = [draws(StepNoise(*key), times=3) for key in ((1, 5, 1), (0, 6, 1), (0, 5, 2))]
    assert not any(torch.equal(other, first) for other in others)


def test_integers_are_uniform():
    k = StepNoise(0).integers(5, torch.empty(10_000, dtype=torch.int64))
    assert k.dtype == torch.int64
    assert torch.bincount(k, minlength=5).min() > 1_840  # of 2,000, 4 standard deviations
    assert len(torch.bincount(k)) == 5


# --- per place in a step's batch ------------------------------------------------------------------------------


def whole_and_parts(draw, like=LIKE, batch=6):
    """What a draw gives for all six images at once, and for micro-batches of them put together."""
    cuts = [range(6)], [range(1), range(1, 4), range(4, 6)]
    return [
        torch.cat([draw(BatchNoise(3, 7, places, batch), like[places.start : places.stop]) for places in cut])
        for cut in cuts
    ]


PLACED = {
    "normal": lambda noise, like: torch.stack([noise.normal(like), noise.normal(like)], 1),
    "uniform": lambda noise, like: noise.uniform(like.double()),
    "integers": lambda noise, like: noise.integers(1000, like),
    "spread": lambda noise, like: (noise.common(torch.zeros(1)) + noise.places(like)[0] / noise.places(like)[1]) % 1,
}


@pytest.mark.parametrize("draw", PLACED.values(), ids=PLACED.keys())
def test_an_image_sees_the_same_numbers_in_any_micro_batch(draw):
    whole, parts = whole_and_parts(draw)
    assert torch.equal(whole, parts)
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 6


@pytest.mark.parametrize("phase", [0, 3])
def test_dropout_is_the_images_own(phase):
    def draw(noise, like):
        with noise.for_networks(phase):
            return torch.stack([dropout(torch.ones_like(like), 0.4, True) for _ in range(2)], 1)

    like = torch.ones(6, 40, 5)
    whole, parts = whole_and_parts(draw, like)
    assert torch.equal(whole, parts)
    assert sorted(whole.unique().tolist()) == pytest.approx([0.0, 1 / 0.6])
    assert float((whole == 0).float().mean()) == pytest.approx(0.4, abs=0.05)
    assert not torch.equal(whole[:, 0], whole[:, 1])


def test_dropout_can_be_drawn_again_and_else_is_not():
    noise = BatchNoise(0, 0, range(4), 4)
    ones = torch.ones(4, 50)
    with noise.for_networks(0):
        with noise.same_dropout():
            first = dropout(ones, 0.5, True), torch.rand(3)
        again = dropout(ones, 0.5, True), torch.rand(3)
        later = dropout(ones, 0.5, True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(again[0], later)
    assert torch.equal(dropout(ones, 0.5, False), ones)


@pytest.mark.parametrize("p", [1.0, 1 - 2**-20])
def test_dropout_may_let_nothing_through(p):
    noise = BatchNoise(0, 0, range(4), 4)
    with noise.for_networks(0):
        assert not kept(torch.ones(4, 50), p).any()


def test_dropout_of_edm2s_network_is_the_images_own():
    config = EDM2UNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                            num_blocks=1, attn_resolutions=(), dropout=0.5)  # fmt: skip
    network = EDM2UNet(config).train()
    torch.nn.init.ones_(network.out_gain)
    x, c = torch.ones(4, 1, 8, 8), torch.zeros(4)
    made = []
    for cut in ([range(4)], [range(1), range(1, 4)]):
        for places in cut:
            with BatchNoise(0, 0, places, 4).for_networks(0), torch.no_grad():
                made.append(network(x[places.start : places.stop], c[places.start : places.stop]))
    torch.testing.assert_close(torch.cat(made[1:]), made[0])
    assert not torch.equal(made[0][0], made[0][1])


def test_what_is_common_does_not_depend_on_other_draws():
    first, other = BatchNoise(0, 0, range(2), 4), BatchNoise(0, 0, range(2, 4), 4)
    other.normal(torch.empty(2, 3))
    assert torch.equal(first.common(torch.empty(5)), other.common(torch.empty(5)))
    assert not torch.equal(first.common(torch.empty(5)), BatchNoise(0, 1, range(2), 4).common(torch.empty(5)))


def test_blocks_of_the_batch_have_numbers_of_their_own():
    noise = BatchNoise(0, 0, range(2, 5), 8)
    twice = noise.normal(torch.empty(6, 9))
    assert torch.equal(twice[:3], BatchNoise(0, 0, range(2, 5), 8).normal(torch.empty(3, 9)))
    assert not torch.equal(twice[:3], twice[3:])
    with pytest.raises(ValueError, match="noise for 3 images asked to fill"):
        noise.normal(torch.empty(1))


def test_wide_numbers_are_the_narrow_ones_with_more_digits():
    like = torch.empty(6, 1000)
    for draw, tolerance in (("normal", 1e-5), ("uniform", 2**-24)):
        narrow, wide = (getattr(BatchNoise(0, 1, range(6), 6), draw)(x) for x in (like, like.double()))
        assert float((narrow - wide).abs().max()) < tolerance


def test_seeds_steps_places_draws_and_elements_are_independent():
    rows = torch.cat(
        [
            draws(BatchNoise(seed, step, range(4), 4), torch.empty(4, 4000), times=2).flatten(0, 1)
            for seed in (0, 1)
            for step in (0, 1)
        ]
    )
    correlation = torch.corrcoef(rows)
    assert (correlation - torch.eye(len(rows))).abs().max() < 4.5 / math.sqrt(4000)
    neighbours = torch.corrcoef(torch.stack([rows.flatten()[:-1], rows.flatten()[1:]]))[0, 1]
    assert abs(float(neighbours)) < 4.5 / math.sqrt(rows.numel())


def test_same_dropout_puts_the_generator_back():
    torch.manual_seed(0)
    with StepNoise(0).same_dropout():
        first = torch.rand(4)
    assert torch.equal(torch.rand(4), first)


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    draws(ImageNoise(0, range(6)))
    draws(StepNoise(0), draw="uniform")
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_are_positive_and_spread():
    seeds = [derive_seed(seed, index, stream) for seed in range(10) for index in range(100) for stream in range(2)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert 0.45 < sum(seed > 2**62 for seed in seeds) / len(seeds) < 0.55
