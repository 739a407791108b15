"""MaskGIT's decoding: how many tokens stay unknown, what is kept, randomness, guidance, mistakes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from imagewright.models.tokens import PixelCodec
from imagewright.noise import ImageNoise, StepNoise
from imagewright.oracles import MarkovChain, MarkovTokens, MixtureTokens, ProductMixture
from imagewright.samplers import MaskedDecoding
from imagewright.samplers.categorical import draw
from imagewright.types import UNCONDITIONAL, Condition, UserError

SIDE, VALUES = 4, 3


class Watched:
    """A token model that keeps what it was shown; every place of its own distribution, and the class adds to it."""

    order: Literal["masked", "causal"] = "masked"

    def __init__(self, side: int = SIDE, values: int = VALUES) -> None:
        self.codec = PixelCodec(side, 1, values)
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(self.codec.length, values, generator=generator, dtype=torch.float64)
        self.seen: list[Tensor] = []
        self.times: list[Tensor | None] = []

    def logits(self, tokens: Tensor, cond: Condition = UNCONDITIONAL, time: Tensor | None = None) -> Tensor:
        self.seen.append(tokens.clone())
        self.times.append(time)
        told = 0.0 if cond.label is None else (cond.label >= 0).double()[:, None, None]
        return self.table.expand(len(tokens), -1, -1) + told * self.table.flip(1)


def unknown(n: int, model: Any) -> Tensor:
    return torch.full((n, model.codec.length), model.codec.values)


def markov() -> MarkovTokens:
    transition = 0.85 * torch.eye(VALUES, dtype=torch.float64) + 0.15 / VALUES
    chain = MarkovChain(torch.full((VALUES,), 1 / VALUES, dtype=torch.float64), transition, SIDE**2)
    return MarkovTokens(chain, PixelCodec(SIDE, 1, VALUES), "masked")


def test_the_published_counts_of_256_tokens_in_8_passes() -> None:
    decoding = MaskedDecoding(num_steps=8)
    counts = [decoding.unknown_after(t, 256) for t in range(8)]
    assert counts == [251, 236, 212, 181, 142, 97, 49, 0]
    model = Watched(16)
    decoding.fill(model, unknown(2, model), noise=StepNoise(0))
    for shown, count in zip(model.seen, [256, *counts[:-1]], strict=True):
        assert ((shown == VALUES).sum(1) == count).all()
    times = [float(t[0]) for t in model.times if t is not None]
    assert times == pytest.approx([c / 256 for c in [256, *counts[:-1]]])


def test_counts_that_are_whole_lose_nothing_to_rounding() -> None:
    for n in range(2, 60):
        decoding = MaskedDecoding(num_steps=n, schedule="linear")
        assert [decoding.unknown_after(t, n) for t in range(n)] == list(range(n - 1, -1, -1))


def test_one_pass_is_one_independent_draw_a_token() -> None:
    model = Watched()
    drawn = MaskedDecoding(num_steps=1).fill(model, unknown(5, model), noise=StepNoise(3))
    uniform = StepNoise(3).uniform(torch.zeros(5, SIDE**2, dtype=torch.float64))
    assert torch.equal(drawn, draw(model.table.expand(5, -1, -1), uniform))
    assert len(model.seen) == 1


@pytest.mark.parametrize("choice", ["confidence", "random"])
def test_known_tokens_never_change_nor_become_unknown(choice: Literal["confidence", "random"]) -> None:
    model = Watched()
    given = torch.randint(VALUES + 1, (6, SIDE**2), generator=torch.Generator().manual_seed(1))
    given[0] = VALUES
    given[1] = 0
    before = given.clone()
    drawn = MaskedDecoding(num_steps=6, choice=choice).fill(model, given, noise=StepNoise(0))
    known = given < VALUES
    assert torch.equal(given, before) and torch.equal(drawn[known], given[known]) and drawn.max() < VALUES
    decided = known
    for shown in model.seen:  # what is decided once stays as it is
        assert torch.equal(shown[decided], drawn[decided])
        decided = shown < VALUES
        assert (decided | ~known).all()


def test_confidence_keeps_the_surest() -> None:
    model = Watched()
    # At no noise on the confidence, those that stay unknown after the first pass are the least probable draws.
    MaskedDecoding(num_steps=2, temperature=0.0).fill(model, unknown(4, model), noise=StepNoise(0))
    first = draw(model.table.expand(4, -1, -1), StepNoise(0).uniform(torch.zeros(4, SIDE**2, dtype=torch.float64)))
    surety = torch.log_softmax(model.table, 1).expand(4, -1, -1).gather(2, first[..., None])[..., 0]
    hidden = model.seen[1] == VALUES
    for row in range(4):
        assert surety[row][hidden[row]].max() <= surety[row][~hidden[row]].min()


def test_gumbel_noise_mixes_the_order_and_dies_out() -> None:
    def hidden_after(temperature: float, passes: int) -> Tensor:
        model = Watched()
        MaskedDecoding(num_steps=passes, temperature=temperature, schedule="linear").fill(
            model, unknown(200, model), noise=StepNoise(0)
        )
        return model.seen[1] == VALUES

    cold, hot = hidden_after(0.0, 4), hidden_after(1e6, 4)
    # Noise alone leaves every place unknown equally often, 3 of 4 times; confidence does not.
    assert (hot.double().mean(0) - 0.75).abs().max() < 0.12 < (cold.double().mean(0) - 0.75).abs().max()


def test_the_noise_on_the_confidence_is_gumbels_and_falls_linearly() -> None:
    model = Watched()
    MaskedDecoding(num_steps=4, temperature=4.5).fill(model, unknown(50, model), noise=StepNoise(0))
    noise, like = StepNoise(0), torch.zeros(50, SIDE**2, dtype=torch.float64)
    shown = [s == VALUES for s in model.seen]
    log_p = torch.log_softmax(model.table, 1).expand(50, -1, -1)
    for t, (before, after) in enumerate(itertools.pairwise(shown)):
        drawn = draw(model.table.expand(50, -1, -1), noise.uniform(like))
        gumbel = -torch.log(-torch.log(noise.uniform(like)))
        sure = log_p.gather(2, drawn[..., None])[..., 0] + 4.5 * (1 - (t + 1) / 4) * gumbel
        sure = sure.masked_fill(~before, torch.inf)
        cut = sure.sort(1).values.gather(1, after.sum(1, keepdim=True))  # as the released program cuts
        assert torch.equal(sure < cut, after)


def test_an_edit_of_few_tokens_decides_one_a_pass_and_keeps_one_for_the_last() -> None:
    model = Watched()
    given = torch.zeros(1, SIDE**2, dtype=torch.int64)
    given[0, :3] = VALUES
    MaskedDecoding(num_steps=12).fill(model, given, noise=StepNoise(0))
    assert [int((shown == VALUES).sum()) for shown in model.seen] == [3, 2] + [1] * 10


def test_one_token_a_pass_at_random_places_draws_from_the_source() -> None:
    model = markov()
    n, length = 2000, SIDE**2
    decoding = MaskedDecoding(num_steps=length, schedule="linear", choice="random")
    drawn = decoding.fill(model, unknown(n, model), noise=StepNoise(5))
    nats = model.nll(drawn)
    assert abs(float(nats.mean()) - model.chain.entropy()) < 4 * float(nats.std()) / n**0.5
    few = replace(decoding, num_steps=1).fill(model, unknown(n, model), noise=StepNoise(5))
    assert float(model.nll(few).mean()) > model.chain.entropy() + 3  # all at once is something else


def test_an_image_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    tables = torch.softmax(2 * torch.randn(3, SIDE**2, VALUES, dtype=torch.float64), 2)
    source = ProductMixture(torch.full((3,), 1 / 3, dtype=torch.float64), tables)
    model = MixtureTokens(source, PixelCodec(SIDE, 1, VALUES))
    decoding = MaskedDecoding(num_steps=4)
    latents = torch.zeros(5, 1)
    together = decoding(model, latents, noise=ImageNoise(7, range(5)))
    assert together.shape == (5, 1, SIDE, SIDE)
    for i in range(5):
        assert torch.equal(decoding(model, latents[:1], noise=ImageNoise(7, [i]))[0], together[i])


def test_editing_may_start_later() -> None:
    model = Watched()
    MaskedDecoding(num_steps=12).fill(model, unknown(1, model), noise=StepNoise(0), start=2)
    assert len(model.seen) == 10
    assert int((model.seen[1] == VALUES).sum()) == MaskedDecoding(num_steps=12).unknown_after(2, SIDE**2)


def test_guidance_goes_beyond_the_model_with_its_class() -> None:
    model = Watched()
    tokens, cond = unknown(2, model), Condition(label=torch.tensor([0, 1]))
    assert MaskedDecoding(guidance=1).nfe == 8 and MaskedDecoding(guidance=3).nfe == 16
    drawn = MaskedDecoding(num_steps=1, guidance=3).fill(model, tokens, cond, noise=StepNoise(2))
    assert len(model.seen) == 2
    without = torch.log_softmax(model.table, 1)
    guided = without + 3 * (torch.log_softmax(model.table + model.table.flip(1), 1) - without)
    uniform = StepNoise(2).uniform(torch.zeros(2, SIDE**2, dtype=torch.float64))
    assert torch.equal(drawn, draw(guided.expand(2, -1, -1), uniform))


def test_it_tells_what_it_does() -> None:
    told: list[float] = []
    model = Watched()
    MaskedDecoding(num_steps=3)(
        model,
        torch.zeros(2, 1),
        noise=StepNoise(0),
        on_step=lambda x, x0, share: told.append(share),  # type: ignore[arg-type]
    )
    assert told[0] == 1 and told == sorted(told, reverse=True) and len(told) == 3


def test_mistakes_are_named() -> None:
    for settings, said in (
        ({"num_steps": 0}, "num_steps is 0"),
        ({"schedule": "cos"}, "schedule is 'cos'"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"choice": "surest"}, "choice is 'surest'; allowed: confidence, random"),
        ({"guidance": float("inf")}, "guidance is inf"),
    ):
        with pytest.raises(UserError, match=f"sampler.{said}"):
            MaskedDecoding(**settings)  # type: ignore[arg-type]
    model = Watched()
    with pytest.raises(UserError, match="token 5 is none of the codec's; they are 0 to 2, and 3 for unknown"):
        MaskedDecoding().fill(model, unknown(1, model) + 2, noise=StepNoise(0))
    with pytest.raises(UserError, match=r"start is 8; it must lie in 0 .. 7"):
        MaskedDecoding().fill(model, unknown(1, model), noise=StepNoise(0), start=8)
    with pytest.raises(ValueError, match="noise source"):
        MaskedDecoding().fill(model, unknown(1, model))
    model.order = "causal"
    with pytest.raises(UserError, match="a Watched knows only those before"):
        MaskedDecoding().fill(model, unknown(1, model), noise=StepNoise(0))
    model.order, model.label_dropout = "masked", 0.0  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"guidance is 2; .*--method\.label-dropout above 0"):
        MaskedDecoding(guidance=2).fill(model, unknown(1, model), noise=StepNoise(0))
