"""GenMD4: the leave-one-out gradient against enumeration of all masks, what it learns, what it logs, mistakes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.genmd4 import GenMD4, leave_one_out, mask_log_probability
from imagewright.models.masked_diffusion import LearnedMaskingModel
from imagewright.models.tokens import PixelCodec
from imagewright.noise import StepNoise
from imagewright.types import UNCONDITIONAL, Batch, Clock, Condition, DataSpec, Update, UserError

VALUES = 3
SPEC = DataSpec(name="test", resolution=1, channels=2)
CLOCK = Clock(step=0, images=0, total_images=1)
MASKS = torch.tensor(list(itertools.product([False, True], repeat=2)))


class Pairs(nn.Module):
    """Logits of each of two tokens that depend on the other, unknown or not, and on the time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(2, VALUES + 1, VALUES, dtype=torch.float64))
        self.slope = nn.Parameter(torch.randn(VALUES, dtype=torch.float64))

    def forward(self, tokens: Tensor, time: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        logits = torch.stack([self.table[0, tokens[:, 1]], self.table[1, tokens[:, 0]]], 1)
        return logits + time.double()[:, None, None] * self.slope


def model() -> LearnedMaskingModel:
    made = LearnedMaskingModel(Pairs(), PixelCodec(1, 2, VALUES), epsilon=1e-2, first=0.1).double()
    with torch.no_grad():
        made.raw_powers.copy_(torch.tensor([-1.0, 0.7, 2.0]))
    return made


@pytest.mark.parametrize("time", [0.15, 0.5, 1.0])
def test_the_gradient_is_that_of_the_enumeration(time: float) -> None:
    made = model()
    parameters = list(made.parameters())
    tokens, t = torch.tensor([[2, 0]]), torch.full((1,), time, dtype=torch.float64)

    def probabilities() -> Tensor:
        return mask_log_probability(made.hidden(tokens, t).expand(4, -1), MASKS).exp()

    p = probabilities()
    assert float(p.detach().sum()) == pytest.approx(1, abs=1e-12)
    bound = made.bound(tokens.expand(4, -1), MASKS, t.expand(4)).published
    exact_value = (p * bound).sum()
    exact = torch.autograd.grad(exact_value, parameters)

    value = torch.zeros((), dtype=torch.float64)
    found = [torch.zeros_like(q) for q in parameters]
    frozen = probabilities().detach()
    for i, j in itertools.product(range(4), repeat=2):
        nats, surrogate = leave_one_out(made, tokens, (MASKS[i : i + 1], MASKS[j : j + 1]), t, UNCONDITIONAL)
        torch.testing.assert_close(nats, surrogate)
        weight = frozen[i] * frozen[j]
        value = value + weight * surrogate.detach().sum()
        for mean, slope in zip(found, torch.autograd.grad(surrogate.sum(), parameters), strict=True):
            mean += weight * slope
    torch.testing.assert_close(value, exact_value.detach())
    for mean, slope in zip(found, exact, strict=True):
        torch.testing.assert_close(mean, slope, rtol=1e-10, atol=1e-12)
    if time == 1:  # all is unknown there, but for epsilon
        return
    # Without the score the schedule's gradient is another one.
    plain = torch.autograd.grad((frozen * made.bound(tokens.expand(4, -1), MASKS, t.expand(4)).published).sum(),
                                [made.raw_powers])[0]  # fmt: skip
    own = exact[[q is made.raw_powers for q in parameters].index(True)]
    assert not torch.allclose(plain, own, rtol=1e-2)


def batch(n: int) -> Batch:
    levels = torch.randint(VALUES, (n, 2), generator=torch.Generator().manual_seed(0))
    return Batch(PixelCodec(1, 2, VALUES).decode(levels))


def test_a_step_gives_gradients_to_network_and_schedule() -> None:
    method = GenMD4()
    parts = method.parts(network=Pairs(), codec=PixelCodec(1, 2, VALUES), spec=SPEC)
    assert torch.allclose(parts.model.powers, torch.ones(VALUES).double())
    (event,) = method.step(parts, batch(16), StepNoise(0), CLOCK)
    assert isinstance(event, Update) and event.loss.shape == (16,)
    event.loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parts.model.parameters())
    assert float(event.parts["power_least"]) == pytest.approx(1) == float(event.parts["power_most"])
    again = next(iter(method.step(parts, batch(16), StepNoise(0), CLOCK)))
    assert isinstance(again, Update) and torch.equal(event.loss, again.loss)


def test_the_two_masks_differ_at_one_time() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(Pairs):
        def forward(self, tokens: Tensor, time: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
            seen.append((tokens, time))
            return super().forward(tokens, time, cond)

    method = GenMD4(first=0.01)
    list(method.step(method.parts(network=Watched(), codec=PixelCodec(1, 2, VALUES), spec=SPEC), batch(64),
                     StepNoise(0), CLOCK))  # fmt: skip
    (one, t1), (two, t2) = seen
    assert torch.equal(t1, t2) and not torch.equal(one, two)
    assert float(t1.min()) >= 0.01 and float(t1.max()) <= 1
    torch.testing.assert_close(t1.sort().values.diff(), torch.full((63,), 0.99 / 64), rtol=1e-4, atol=0)


def test_a_schedule_of_its_own_lowers_the_bound_of_a_limited_network() -> None:
    """Token 0 is 0 or 2, token 1 a coin 0/1 after 2, else 2. Blind to token 1 when it guesses token 0, the network does
    best where token 0 is known first, and the value 1, which token 0 never has, comes late.
    """
    generator = torch.Generator().manual_seed(0)
    first = torch.where(torch.rand(512, generator=generator) < 0.5, 2, 0)
    coin = (torch.rand(512, generator=generator) < 0.5).long()
    levels = torch.stack([first, torch.where(first == 2, coin, 2)], 1)
    images = PixelCodec(1, 2, VALUES).decode(levels)

    class Blind(Pairs):
        def forward(self, tokens: Tensor, time: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
            return super().forward(torch.stack([tokens[:, 0], torch.full_like(tokens[:, 1], VALUES)], 1), time, cond)

    def trained(learn: bool) -> tuple[float, Tensor]:
        method = GenMD4()
        parts = method.parts(network=Blind(), codec=PixelCodec(1, 2, VALUES), spec=SPEC)
        parts.model.raw_powers.requires_grad_(learn)
        optimiser = torch.optim.Adam([p for p in parts.model.parameters() if p.requires_grad], lr=0.05)
        late = []
        for i in range(200):
            (event,) = method.step(parts, Batch(images), StepNoise(i), CLOCK)
            assert isinstance(event, Update)
            optimiser.zero_grad()
            event.loss.mean().backward()
            optimiser.step()
            late.append(2 * float(event.loss.detach().mean()))
        return sum(late[-50:]) / 50, parts.model.powers.detach()

    (learned, powers), (fixed, _) = trained(True), trained(False)
    assert learned < fixed - 0.02 and powers[1] < powers.min(0).values + 1e-9


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"method\.first is 1.0; it must lie in \(0, 1\)"):
        GenMD4(first=1.0)
    with pytest.raises(UserError, match=r"method\.epsilon is -1"):
        GenMD4(epsilon=-1)
