"""Products of whole numbers: layer by layer the same numbers as in floats, where the processor has them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.networks import integers
from imagewright.networks.config import Network, NetworkConfig
from imagewright.networks.integers import Integral, with_integers
from imagewright.networks.quantized import Quantized, layers_of, simulate, store
from imagewright.types import UserError

here = pytest.mark.skipif(not integers._exact(), reason="this processor adds no 8-bit products without losing any")


class Layers(Network):
    """One of each kind."""

    config_class = NetworkConfig

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.strided = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 9, 3, stride=2, padding=1, bias=False)
        self.grouped, self.point = nn.Conv2d(6, 6, 5, padding=2, groups=6), nn.Conv2d(6, 4, 1)
        self.line, self.same = nn.Linear(6, 7), nn.Conv2d(6, 2, 3, padding="same")

    def forward(self, x: Tensor, label: Tensor) -> dict[str, Tensor]:
        convolved = {name: layer(x) for name, layer in layers_of(self) if name != "line"}
        return {**convolved, "line": self.line(x.permute(0, 2, 3, 1)), "vector": self.line(x[:, :, 0, 0])}


def stored(bits: int, *, activations: int = 8, buckets: int = 1, low: float = -2.0, high: float = 3.0) -> Any:
    network = Layers().eval().requires_grad_(False)
    for _, layer in layers_of(network):
        layer.weight[0].abs_().add_(0.3)  # a channel whose numbers are all on one side
    simulate(network, Quantized(bits=bits, activation_bits=activations, buckets=buckets))
    for _, layer in layers_of(network) if activations else ():
        layer.low.copy_(low * torch.arange(1, buckets + 1))
        layer.high.copy_(high * torch.arange(1, buckets + 1))
    store(network)
    return network


def inputs() -> Tensor:
    return torch.randn(3, 6, 8, 8, generator=torch.Generator().manual_seed(1)) * 2


@here
@pytest.mark.parametrize(("bits", "activations"), [(2, 8), (4, 8), (4, 5), (8, 8), (8, 4)])
def test_layers_answer_as_in_floats(bits: int, activations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = stored(bits, activations=activations), inputs()
    wanted = network(x, torch.zeros(3))
    with_integers(network)
    few = network(x, torch.zeros(3))  # of so few products none is worth it
    assert all(torch.equal(few[name], each) for name, each in wanted.items())
    monkeypatch.setattr(integers, "LEAST", 0)
    found = network(x, torch.zeros(3))
    for name, each in wanted.items():
        torch.testing.assert_close(found[name], each, rtol=1e-5, atol=1e-5)
    with_integers(network)  # again changes nothing
    for same in (network, copy.deepcopy(network)):
        assert all(torch.equal(each, found[name]) for name, each in same(x, torch.zeros(3)).items())
    floats = bits == 8  # whose grouped layers would need the sum of each group
    whole = {name for name, layer in layers_of(network) if layer.prepared is not None}
    assert whole == {"wide", "strided", "point", "line"} | (set() if floats else {"grouped"})
    assert any(not torch.equal(found[name], each) for name, each in wanted.items())  # other sums than before
    if bits == 8:
        assert network.wide.prepared.back is not None


@here
def test_images_of_one_noise_level_share_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integers, "LEAST", 0)
    plain, x = stored(4, buckets=2), inputs()
    whole = copy.deepcopy(plain)
    with_integers(whole)
    for labels, used in (([0, 0, 0], True), ([1, 1, 1], True), ([0, 1, 1], False)):
        for network in (plain, whole):
            next(iter(layers_of(network)))[1].levels.index = torch.tensor(labels)
        wanted, found = plain.wide(x), whole.wide(x)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(found, wanted) != used
    torch.testing.assert_close(whole.line(x[:2, :, 0, 0]), plain.line(x[:2, :, 0, 0]))  # rows that are no images
    for network in (plain, whole):  # asked with other weights than its own
        network.wide.levels.index = torch.zeros(3, dtype=torch.int64)
    told = [each.wide._conv_forward(x, 2 * each.wide.weight, each.wide.bias) for each in (whole, plain)]
    assert torch.equal(*told)


@here
def test_inputs_of_64_bits_and_buckets_without_a_range_stay_with_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integers, "LEAST", 0)
    network, x = stored(4).double(), inputs().double()
    wanted = network(x, torch.zeros(3))
    with_integers(network)
    assert all(torch.equal(found, wanted[name]) for name, found in network(x, torch.zeros(3)).items())
    partly = stored(4, buckets=2)
    partly.wide.high[1] = partly.wide.low[1]
    with_integers(partly)
    assert partly.wide.prepared is None and partly.point.prepared is not None


@here
@pytest.mark.parametrize(("low", "high"), [(1.0, 3.0), (-3.0, -1.0)])
def test_a_range_without_zero_stays_with_floats(low: float, high: float) -> None:
    network = stored(4, low=low, high=high)
    with pytest.raises(UserError, match="none of its layers has a range of inputs"):
        with_integers(network)


def test_what_has_no_whole_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="its weights are floats"):
        with_integers(Layers())
    monkeypatch.setattr(integers, "_exact", lambda: False)
    with pytest.raises(UserError, match="int8 needs a CPU that adds 8-bit products"):
        with_integers(stored(4))
    monkeypatch.setattr(integers, "_exact", lambda: True)
    network = stored(4, activations=0)
    with pytest.raises(UserError, match="none of its layers has a range of inputs"):
        with_integers(network)
    assert not any(isinstance(m, Integral) for m in network.modules())
