"""Randomized parallel decoding: sizes of steps, orders, what is shown and asked, guidance, filling, mistakes."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from imagewright.models.random_order import RandomOrderModel
from imagewright.models.tokens import PixelCodec
from imagewright.networks import ARPG, ARPGConfig
from imagewright.noise import ImageNoise, StepNoise
from imagewright.oracles import MixtureTokens, ProductMixture
from imagewright.samplers import MaskedDecoding, RandomizedParallel
from imagewright.samplers.generator import ImageGenerator, usual_sampler
from imagewright.samplers.token_editing import TokenEditing
from imagewright.types import UNCONDITIONAL, Condition, DataSpec, UserError

SIDE, VALUES = 4, 3
LENGTH = SIDE * SIDE


class Oracle:
    """A mixture of products behind the cache's face; keeps what it was shown and asked."""

    order: Literal["masked", "causal"] = "masked"

    def __init__(self) -> None:
        tables = torch.rand(3, LENGTH, VALUES, generator=torch.Generator().manual_seed(0)).double() ** 4
        weights = torch.full((3,), 1 / 3, dtype=torch.float64)
        self.codec = PixelCodec(SIDE, 1, VALUES)
        self.exact = MixtureTokens(ProductMixture(weights, tables / tables.sum(2, keepdim=True)), self.codec)
        self.asked: list[Tensor] = []
        self.shown: list[tuple[Tensor, bool]] = []

    def logits(self, tokens: Tensor, cond: Condition = UNCONDITIONAL, time: Tensor | None = None) -> Tensor:
        return self.exact.logits(tokens, cond, time)

    def start(self, cond: Condition, n: int, expansion: int) -> Tensor:
        return torch.full((n, LENGTH), VALUES)

    def show(self, tokens: Tensor, places: Tensor, cache: Tensor, *, causal: bool) -> None:
        assert (cache.gather(1, places) == VALUES).all()  # never twice
        cache.scatter_(1, places, tokens)
        self.shown.append((places, causal))

    def ask(self, places: Tensor, cache: Tensor) -> Tensor:
        assert (cache.gather(1, places) == VALUES).all()
        self.asked.append(places)
        return self.logits(cache).gather(1, places[..., None].expand(-1, -1, VALUES))


def unknown(n: int) -> Tensor:
    return torch.full((n, LENGTH), VALUES)


def model(label_dropout: float = 0.1, **more: Any) -> RandomOrderModel:
    torch.manual_seed(0)
    sizes = {"values": VALUES, "length": LENGTH, "label_dim": 2, "width": 16, "depth": 2, "heads": 2, **more}
    net = ARPG(ARPGConfig(**sizes, hidden_multiple=4))
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return RandomOrderModel(net, PixelCodec(SIDE, 1, VALUES), label_dropout).eval()


@pytest.mark.parametrize("schedule", ["arccos", "cosine"])
def test_every_step_decodes_one_token_at_least_and_all_together_every_one(schedule: str) -> None:
    for tokens in (1, 2, 16, 63, 64, 256):
        for steps in range(1, tokens + 1):
            sizes = RandomizedParallel(num_steps=steps, schedule=schedule).sizes(tokens)
            assert len(sizes) == steps and min(sizes) >= 1 and sum(sizes) == tokens
        assert sizes == [1] * tokens  # as many steps as tokens
        assert RandomizedParallel(num_steps=tokens + 5, schedule=schedule).sizes(tokens) == sizes
    assert RandomizedParallel().sizes(0) == []


def test_the_published_sizes_of_256_tokens_in_8_steps() -> None:
    assert RandomizedParallel(num_steps=8, schedule="cosine").sizes(256)[:4] == [5, 15, 24, 31]
    sizes = RandomizedParallel(num_steps=8).sizes(256)
    assert sizes[:4] == [21, 21, 21, 23] and sizes[-1] == 82


def test_where_the_cosine_is_a_half_it_rounds_as_the_released_one() -> None:
    """After 26 of 39 steps cos(pi / 3) of 64 tokens are unknown: 31 there, where 32 is as near."""
    assert sum(RandomizedParallel(num_steps=39, schedule="cosine").sizes(64)[26:]) == 31


def test_each_place_is_asked_once_and_shown_before_the_next_step() -> None:
    oracle = Oracle()
    RandomizedParallel(num_steps=5).fill(oracle, unknown(4), noise=StepNoise(0))
    assert torch.equal(torch.cat(oracle.asked, 1).sort(1).values, torch.arange(LENGTH).expand(4, -1))
    for asked, (shown, causal) in zip(oracle.asked[:-1], oracle.shown, strict=True):  # the last step's are not shown
        assert torch.equal(asked, shown) and not causal
    first = torch.cat(oracle.asked, 1)
    assert not torch.equal(first[0], first[1])  # of each image its own order
    oracle = Oracle()
    RandomizedParallel(num_steps=5, causal=True).fill(oracle, unknown(4), noise=StepNoise(0))
    assert all(causal for _, causal in oracle.shown)


def test_one_token_a_step_draws_from_the_models_law_and_few_steps_do_not() -> None:
    def excess(steps: int) -> tuple[float, float]:
        oracle, n = Oracle(), 3000
        source = oracle.exact.mixture
        real = source.log_prob(source.sample(n, StepNoise(1)))
        drawn = source.log_prob(RandomizedParallel(num_steps=steps).fill(oracle, unknown(n), noise=StepNoise(2)))
        return float(real.mean() - drawn.mean()), float((real.var() + drawn.var()).div(n).sqrt())

    gap, error = excess(LENGTH)
    assert abs(gap) < 3 * error
    gap, error = excess(1)
    assert gap > 10 * error


def test_what_is_known_stays_comes_first_and_is_shown_at_once_in_a_random_order() -> None:
    given = torch.randint(VALUES, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    given[:, 4:] = VALUES
    given[1] = given[1].flip(0)  # as many in each, elsewhere in one
    oracle, before = Oracle(), given.clone()
    drawn = RandomizedParallel(num_steps=4).fill(oracle, given, noise=StepNoise(0))
    known = given < VALUES
    assert torch.equal(given, before) and torch.equal(drawn[known], given[known]) and drawn.max() < VALUES
    places, causal = oracle.shown[0]
    assert causal and known.gather(1, places).all() and places.shape == (3, 4)
    assert not torch.equal(places, places.sort(1).values)
    assert [asked.shape[1] for asked in oracle.asked] == RandomizedParallel(num_steps=4).sizes(12)
    whole = RandomizedParallel().fill(oracle, drawn, noise=StepNoise(0))
    assert torch.equal(whole, drawn) and len(oracle.asked) == 4  # nothing to do
    with pytest.raises(UserError, match="as many unknown tokens"):
        RandomizedParallel().fill(oracle, torch.cat([given[:1], unknown(1)]), noise=StepNoise(0))


def test_a_picture_depends_on_its_own_noise_alone() -> None:
    def drawn(indices: list[int], **settings: Any) -> Tensor:
        tokens = unknown(len(indices))
        cond = Condition(label=torch.tensor([i % 2 for i in indices]))
        return RandomizedParallel(num_steps=6, **settings).fill(made, tokens, cond, noise=ImageNoise(3, indices))

    made: Any = model().double()
    assert torch.equal(drawn([4, 5, 6])[1:2], drawn([5]))
    assert torch.equal(drawn([4, 5, 6], guidance=3.0)[2:], drawn([6], guidance=3.0))


def test_guidance_grows_with_the_share_of_decoded_tokens() -> None:
    sampler = RandomizedParallel(guidance=5.0)
    assert [sampler.strength(share) for share in (0.0, 0.25, 1.0)] == [1.0, 2.0, 5.0]
    assert RandomizedParallel(guidance=5.0, ramp="constant").strength(0.1) == 5.0

    class Told(Oracle):
        """The class adds something to one value."""

        def ask(self, places: Tensor, cache: Tensor) -> Tensor:
            base = super().ask(places, cache)
            half = len(base) // 2
            return torch.cat([base[:half] + self.bonus, base[half:]]) if self.doubled else base

        doubled, bonus = True, torch.tensor([0.0, 0.0, 1e9], dtype=torch.float64)

    # The third value is 1e9 more likely with the class than without: any strength above 0 draws it.
    cond = Condition(label=torch.tensor([1, 0]))
    assert (RandomizedParallel(guidance=2.0).fill(Told(), unknown(2), cond, noise=StepNoise(0)) == 2).all()
    Told.bonus = -Told.bonus
    assert (RandomizedParallel(guidance=2.0).fill(Told(), unknown(2), cond, noise=StepNoise(0)) < 2).all()


def test_calls_are_counted_exactly() -> None:
    spec = DataSpec(name="test", resolution=SIDE, channels=1, num_classes=2)
    for settings, calls in (({"num_steps": 5}, 5), ({"num_steps": 5, "guidance": 2.0}, 10), ({}, LENGTH)):
        assert ImageGenerator(model(), spec, RandomizedParallel(**settings)).nfe == calls  # type: ignore[arg-type]
    assert isinstance(usual_sampler(model()), RandomizedParallel)


def test_larger_pictures_are_of_their_own_size_and_seed() -> None:
    spec = DataSpec(name="test", resolution=SIDE, channels=1, num_classes=2)
    generator = ImageGenerator(model(), spec, RandomizedParallel(num_steps=3, expansion=2))
    assert generator.spec.resolution == 2 * SIDE and generator.nfe == 3
    images = generator.generate(3, seed=1)
    assert images.shape == (3, 8, 8, 1) and len({image.tobytes() for image in images}) == 3
    assert (images[2:] == generator.generate(1, seed=1, first=2)).all()


def test_temperature_zero_takes_the_likeliest() -> None:
    oracle = Oracle()
    drawn = RandomizedParallel(num_steps=1, temperature=0.0).fill(oracle, unknown(2), noise=StepNoise(0))
    assert torch.equal(drawn, oracle.logits(unknown(2)).argmax(2))


def test_it_shows_how_far_it_is() -> None:
    looks: list[float] = []
    RandomizedParallel(num_steps=4)(
        Oracle(), torch.zeros(2, 1), noise=StepNoise(0), on_step=lambda x, x0, share: looks.append(share)
    )
    sizes = RandomizedParallel(num_steps=4).sizes(LENGTH)
    assert looks == pytest.approx([1 - sum(sizes[:i]) / LENGTH for i in range(4)])


def test_other_samplers_of_masked_models_draw_from_it_and_it_edits() -> None:
    made: Any = model()
    cond = Condition(label=torch.tensor([0, 1]))
    assert MaskedDecoding(num_steps=3)(made, torch.zeros(2, 1), cond, noise=StepNoise(0)).shape == (2, 1, 4, 4)
    picture = made.codec.decode(torch.randint(VALUES, (2, LENGTH), generator=torch.Generator().manual_seed(0)))
    region = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    region[:2] = True
    editing = TokenEditing(decoding=RandomizedParallel(num_steps=4), start=0)
    edited = editing(made, picture, region, cond, noise=StepNoise(0))
    assert torch.equal(edited[:, :, 2:], picture[:, :, 2:]) and not torch.equal(edited, picture)


def test_mistakes_are_named() -> None:
    for settings, match in (
        ({"schedule": "linear"}, r"sampler\.schedule is 'linear'; it must be one of arccos, cosine"),
        ({"ramp": "square"}, r"sampler\.ramp is 'square'; allowed: linear, constant"),
        ({"temperature": -1.0}, r"sampler\.temperature is -1"),
        ({"guidance": float("inf")}, r"sampler\.guidance is inf"),
        ({"num_steps": 0}, r"sampler\.num_steps is 0"),
        ({"expansion": 0}, r"sampler\.expansion is 0; it must be a whole number from 1 to 16"),
    ):
        with pytest.raises(UserError, match=match):
            RandomizedParallel(**settings)  # type: ignore[arg-type]
    never: Any = model(label_dropout=0.0)
    with pytest.raises(UserError, match=r"guidance is 2\.0; it needs a model whose class was at times hidden"):
        RandomizedParallel(guidance=2.0).fill(never, unknown(1), noise=StepNoise(0))
    with pytest.raises(UserError, match=r"draws from a model of random orders \(ARPG\); a MixtureTokens is none"):
        RandomizedParallel().fill(Oracle().exact, unknown(1), noise=StepNoise(0))
    with pytest.raises(UserError, match=r"tokens are \[1, 7\]; the codec's are \[N, 16\]"):
        RandomizedParallel().fill(Oracle(), unknown(1)[:, :7], noise=StepNoise(0))
