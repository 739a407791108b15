"""The transformer on patches: where things stand, what it is told, and that every method can use it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from imagewright.networks import DiT, DiTConfig
from imagewright.networks.compiling import compile_network
from imagewright.networks.dit import modulated
from imagewright.networks.recompute import blocks
from imagewright.networks.rotary import turned, turns
from imagewright.networks.tangents import derivative
from imagewright.noise import BatchNoise
from imagewright.training.footprint import footprint
from imagewright.types import Condition, DataSpec, UserError

CONFIG = DiTConfig(img_resolution=4, in_channels=3, out_channels=3, label_dim=2, width=16, depth=2, heads=2)
LABEL, X = torch.tensor([0.1, 0.7]), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
COND = Condition(label=torch.tensor([0, 1]))
VARIANTS: dict[str, dict[str, Any]] = {
    "lightning": {},
    "patches": {"patch": 2},
    "one patch": {"patch": 4},
    "plain": {"norm": "layer", "gated": False, "rotary": False},
    "stable": {"qk_norm": True, "shift": False},
    "layer norms of heads": {"qk_norm": True, "norm": "layer"},
}


def network(**settings: Any) -> DiT:
    """With weights that all have an effect, in float64."""
    torch.manual_seed(1)
    made = DiT(replace(CONFIG, **settings)).double().eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return made


def answer(net: DiT, x: Tensor = X, cond: Condition = COND) -> Tensor:
    with torch.no_grad():
        found: Tensor = net(x.double(), LABEL.double(), cond)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_answers_zero_at_first_and_then_with_all_its_weights(variant: str) -> None:
    fresh = DiT(replace(CONFIG, **VARIANTS[variant]))
    assert torch.equal(fresh(X, LABEL, COND), torch.zeros_like(X))
    net = network(**VARIANTS[variant])
    net(X.double(), LABEL.double(), COND).square().sum().backward()
    assert all(
        p.grad is not None and float(p.grad.abs().max()) > 0 for n, p in net.named_parameters() if "qkv.b" not in n
    )


def test_its_initial_weights_are_dits() -> None:
    torch.manual_seed(0)
    net = DiT(replace(CONFIG, width=64, heads=4))
    for layer in (net.into, net.blocks[0].qkv, net.blocks[0].mlp.gate_up, net.blocks[0].mlp.down):  # type: ignore[union-attr]
        bound = (6 / sum(layer.weight.shape)) ** 0.5  # type: ignore[union-attr,operator]
        assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound and not layer.bias.any()  # type: ignore[union-attr,operator]
    for weight in (net.time[0].weight, net.time[2].weight, net.classes.weight):  # type: ignore[union-attr]
        assert float(weight.std()) == pytest.approx(0.02, rel=0.2)


def test_patches_stand_where_they_are() -> None:
    """Without attention a patch's answer depends on its own pixels alone."""
    net = network(patch=2)
    with torch.no_grad():
        for block in net.blocks:
            block.proj.weight.zero_()
    changed = X.clone()
    changed[:, :, 2:, :2] += 1
    difference = (answer(net, changed) - answer(net)).abs().amax((0, 1))
    assert difference[2:, :2].min() > 0 and not difference[:2].any() and not difference[2:, 2:].any()


@pytest.mark.parametrize(
    ("table", "rotary", "moves"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_positions_come_by_the_table_and_by_rotation(table: bool, rotary: bool, moves: bool) -> None:
    """Of neither, an image that is rolled gives the answer rolled."""
    net = network(rotary=rotary)
    if not table:
        net.positions.zero_()
    rolled = answer(net, X.roll((1, 2), (2, 3)))
    assert torch.allclose(rolled, answer(net).roll((1, 2), (2, 3))) == moves


def test_rotation_is_of_distances() -> None:
    at = torch.tensor([[0.0, 0.0], [2.0, 3.0]], dtype=torch.float64)
    q, k = torch.randn(2, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    q[1], k[1] = q[0], k[0]
    products = [turned(q, turns(at + shift, 8)) @ turned(k, turns(at + shift, 8)).mT for shift in (0.0, 5.0)]
    torch.testing.assert_close(products[0], products[1])
    assert float((products[0][0, 1] - products[0][0, 0]).abs()) > 1e-3


def test_the_norm_and_what_follows_it_are_torchs() -> None:
    x, scale, shift = torch.randn(2, 3, 8).double(), torch.randn(2, 1, 8).double(), torch.randn(2, 1, 8).double()
    norm = nn.RMSNorm(8, eps=1e-6).double()
    nn.init.normal_(norm.weight)
    torch.testing.assert_close(modulated(norm, x, scale, shift), norm(x) * (1 + scale) + shift)
    torch.testing.assert_close(modulated(norm, x, scale, None), norm(x) * (1 + scale))
    half = x.to(torch.bfloat16)
    assert modulated(norm, half, scale, shift).dtype == torch.float64  # as wide as what it is told


def test_a_label_is_hidden_at_its_rate_and_never_without_one() -> None:
    net = network(label_dropout=0.25).train()
    cond = Condition(label=torch.zeros(4000, dtype=torch.int64))
    with BatchNoise(0, 1, range(4000), 4000).for_networks(0):
        rows = net._class_rows(cond, torch.zeros(4000, 3))
    assert float((rows == 2).double().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(net.eval()._class_rows(cond, torch.zeros(4000, 3)), cond.label)
    free = Condition(label=torch.tensor([-1, -1]))
    assert torch.equal(answer(net, cond=free), answer(net, cond=Condition()))
    assert float((answer(net) - answer(net, cond=free)).abs().max()) > 1e-3


def test_what_it_may_also_be_told_does_nothing_until_it_is_trained() -> None:
    net = network()
    told = net.told_destination().told_weight().eval()
    cond = replace(COND, destination=torch.tensor([0.3, 0.9]).double(), weight=torch.tensor([1.0, 2.0]).double())
    assert torch.equal(answer(told, cond=cond), answer(net))
    for layer in (told.told_to.layer1, told.told_strength.layer1):  # type: ignore[union-attr]
        nn.init.normal_(layer.weight)
        before = answer(told, cond=cond)
        assert float((before - answer(net)).abs().max()) > 1e-3
        nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="where to go"):
        answer(told)
    fresh = DiT(replace(CONFIG, augment_dim=3)).double()
    assert fresh.augment is not None and not fresh.augment.weight.any()


@pytest.mark.parametrize("variant", ["lightning", "layer norms of heads"])
def test_its_derivative_is_a_quotient_of_differences(variant: str) -> None:
    net, by = network(**VARIANTS[variant]), 1e-6
    x, t, dx, dt = X.double(), LABEL.double(), torch.randn_like(X.double()), torch.tensor([0.5, -1.0]).double()
    value, change = derivative(lambda x, t: net.forward(x, t, COND), (x, t), (dx, dt))
    torch.testing.assert_close(value, answer(net))
    with torch.no_grad():
        want = (net(x + by * dx, t + by * dt, COND) - net(x - by * dx, t - by * dt, COND)) / (2 * by)
    torch.testing.assert_close(change, want, rtol=1e-6, atol=1e-7)
    through = torch.func.jvp(lambda x, t: net(x, t, COND), (x, t), (dx, dt))[1]
    torch.testing.assert_close(through, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("training", [False, True])
def test_one_block_is_compiled_for_all_without_a_break(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    counter, plain = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **o: plain(self, backend=counter, fullgraph=True, **o))
    net = network(depth=3).float().train(training)
    with torch.set_grad_enabled(training):
        cond = Condition(label=torch.tensor([-1, -1]))
        expected = net(X, LABEL, cond)
        compile_network(net)
        torch.testing.assert_close(net(X, LABEL, cond), expected)
    assert counter.frame_count == 1


def test_the_whole_of_it_is_one_graph() -> None:
    net, counter = network().float(), CompileCounter()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(net, backend=counter, fullgraph=True)(X, LABEL, COND), net(X, LABEL, COND)
        )
    assert counter.frame_count == 1


def test_the_middle_is_a_map_of_the_first_half() -> None:
    net = network(depth=3, patch=2)
    middle = net.bottleneck(X.double(), LABEL.double(), COND)
    assert middle.shape == (2, 16, 2, 2)
    with torch.no_grad():
        net.blocks[2].qkv.weight.zero_()
    torch.testing.assert_close(net.bottleneck(X.double(), LABEL.double(), COND), middle)
    with torch.no_grad():
        net.blocks[1].proj.weight.zero_()
    assert not torch.allclose(net.bottleneck(X.double(), LABEL.double(), COND), middle)


def test_recomputed_and_half_precision_answers() -> None:
    net = network(dropout=0.2).float().train()
    grads = []
    for again in (False, True):
        for block in blocks(net):
            block.recompute = again
        net.zero_grad()
        with BatchNoise(0, 1, range(2), 2).for_networks(0):
            net(X, LABEL, COND).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and len(list(blocks(net))) == 2
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = net.eval()(X, LABEL, COND)
    assert float((half.float() - net(X, LABEL, COND)).abs().max()) < 0.1 * float(half.abs().max())


def test_a_dry_run_knows_its_cost() -> None:
    found = footprint(DiT(CONFIG), DataSpec(name="x", resolution=4, channels=3))
    assert found is not None
    width, tokens, hidden = 16, 16, CONFIG.hidden
    block = tokens * (4 * width**2 + 3 * width * hidden + 2 * tokens * width) + 6 * width**2
    ends = tokens * 6 * width + 256 * width + width**2 + 2 * width**2
    assert found.flops == 2 * (2 * block + ends) and found.activation_bytes > 0


@pytest.mark.parametrize(("settings", "says"), [
    ({"patch": 3}, "divisor of img_resolution"), ({"heads": 3}, "divisor of width"), ({"heads": 8}, "multiple of 4"),
    ({"width": 18}, "divisible by 4"), ({"norm": "group"}, "rms or layer"), ({"mlp_ratio": 0.0}, "positive"),
    ({"dropout": 1.0}, "in \\[0, 1\\)"), ({"depth": 0}, "integer >= 1"), ({"label_dropout": -0.1}, "in \\[0, 1\\)"),
])  # fmt: skip
def test_settings_that_are_none(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        replace(CONFIG, **settings)
