"""The causal networks of four papers: causality, cache, class, first answers, recomputation, description."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.models.description import build, describe
from imagewright.networks import (
    AxialTransformer,
    AxialTransformerConfig,
    PerceiverAR,
    PerceiverARConfig,
    RoutingTransformer,
    RoutingTransformerConfig,
    SparseTransformer,
    SparseTransformerConfig,
    TokenTransformer,
    TokenTransformerConfig,
)
from imagewright.networks.recompute import blocks
from imagewright.noise import BatchNoise
from imagewright.types import Condition, UserError

VALUES, LENGTH = 5, 48
SIZES: dict[str, Any] = {
    "values": VALUES, "length": LENGTH, "channels": 3, "label_dim": 3, "width": 16, "depth": 2, "heads": 4
}  # fmt: skip
ROUTING = {"routing_heads": 2, "clusters": 4, "window": 9, "block": 6}
MADE: dict[str, Callable[..., nn.Module]] = {
    "baseline": lambda **more: TokenTransformer(
        TokenTransformerConfig(**{**SIZES, "dropout": 0.0, "causal": True, "post_norm": False, "told_blocks": -1}),
    ),
    "sparse": lambda **more: SparseTransformer(
        SparseTransformerConfig(**{**SIZES, **more}, layers=("strided", "local"))
    ),
    "sparse, fixed": lambda **more: SparseTransformer(
        SparseTransformerConfig(**{**SIZES, **more}, layers=("block", "summary"), cells=2, key_ratio=0.5)
    ),
    "sparse, one head sees both": lambda **more: SparseTransformer(
        SparseTransformerConfig(**{**SIZES, **more}, layers=("local", "strided"), combine="union")
    ),
    "sparse, heads": lambda **more: SparseTransformer(
        SparseTransformerConfig(**{**SIZES, **more}, layers=("block", "summary"), cells=2, combine="heads")
    ),
    "routing": lambda **more: RoutingTransformer(RoutingTransformerConfig(**{**SIZES, **more}, **ROUTING)),
    "perceiver": lambda **more: PerceiverAR(PerceiverARConfig(**{**SIZES, **more}, latents=10)),
    "perceiver, more latents": lambda **more: PerceiverAR(
        PerceiverARConfig(**{**SIZES, **more}, latents=6, test_latents=13, stride=4)
    ),
    "axial": lambda **more: AxialTransformer(AxialTransformerConfig(**{**SIZES, **more})),
}
EACH = pytest.mark.parametrize("name", MADE)
PAPERS = [name for name in MADE if name != "baseline"]


def network(name: str, *, stirred: bool = True, **more: Any) -> Any:
    """A small float64 network, with weights so large that everything has an influence."""
    torch.manual_seed(0)
    net = MADE[name](**more).double().eval()
    if stirred:
        for p in net.parameters():
            p.data += 0.3 * torch.randn_like(p)
    return net


def tokens(n: int = 2) -> Tensor:
    return torch.randint(VALUES, (n, LENGTH), generator=torch.Generator().manual_seed(1))


def order_of(net: nn.Module) -> list[int]:
    order: Tensor = getattr(net, "places", torch.arange(LENGTH))
    return order.tolist()


@EACH
def test_no_answer_depends_on_its_own_token_or_on_later_ones(name: str) -> None:
    net = network(name)
    order, changed = order_of(net), tokens(1).repeat(LENGTH + 1, 1)
    for i, place in enumerate(order):  # a copy for each place, changed there, and one as it is
        changed[i, place] = (changed[i, place] + 1) % VALUES
    with torch.no_grad():
        answers = net(changed)[:, order]
    reached = (answers[:-1] - answers[-1]).abs().amax(2) > 1e-13
    assert not reached.tril().any(), reached.tril().nonzero()
    assert reached.any(1)[:-1].all()  # every token but the last has a say
    assert reached[0].sum() > LENGTH / 3  # the first one not in the next place alone


@EACH
def test_one_place_at_a_time_gives_the_same(name: str) -> None:
    net, sequence, cond = network(name), tokens(3), Condition(label=torch.tensor([2, -1, 0]))
    whole, order, cache = net(sequence, None, cond), order_of(net), net.start(cond, 3)
    steps = [net.step(None if i == 0 else sequence[:, order[i - 1]], cache) for i in range(LENGTH)]
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, order], rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match=f"place {LENGTH} of {LENGTH}"):
        net.step(sequence[:, 0], cache)
    with pytest.raises(ValueError, match="place 0"):
        net.step(sequence[:, 0], net.start(n=3))


@EACH
def test_the_class_is_told_in_every_block_and_without_effect_at_first(name: str) -> None:
    sequence = tokens(1).expand(4, -1)
    cond = Condition(label=torch.tensor([0, 1, 2, -1]))
    fresh = network(name, stirred=False)
    tables = [m for n, m in fresh.named_modules() if n.endswith("told")]
    # One in each block: two of most, of the axial network two in each of three stacks, with a Perceiver's first one.
    assert len(tables) == {"axial": 6, "perceiver": 3, "perceiver, more latents": 3}.get(name, 2)
    assert not any(table.weight.any() for table in tables)
    if name != "baseline":  # which is told at the input, too
        torch.testing.assert_close(fresh(sequence, None, cond)[0], fresh(sequence)[1], rtol=0, atol=0)
    net = network(name)
    whole = net(sequence, None, cond)
    assert (whole[:1] - whole[1:]).abs().amax(2).min() > 1e-9
    torch.testing.assert_close(whole[3:], net(sequence[:1]), rtol=0, atol=1e-12)
    for table in [m for n, m in net.named_modules() if n.endswith("told")]:
        kept, table.weight.data = table.weight.data, table.weight.data.roll(1, 0)
        assert not torch.equal(net(sequence, None, cond), whole)
        table.weight.data = kept
    with pytest.raises(UserError, match="label 3 is no class; they are 0 to 2"):
        net(sequence, None, Condition(label=torch.tensor([0, 1, 2, 3])))


@pytest.mark.parametrize("name", [name for name in PAPERS if name != "routing"])
def test_first_answers_are_even(name: str) -> None:
    answers = network(name, stirred=False)(tokens()).detach()
    nats = nn.functional.cross_entropy(answers.flatten(0, 1), tokens().flatten())
    assert float(nats) == pytest.approx(math.log(VALUES), abs=1e-4)


D, V3 = 64, 64 * 3
"""A width, and the values of three channels' tables."""
CUT = 0.8796
"""Of a normal variable cut at two, its standard deviation."""
FIRST: dict[str, dict[str, float]] = {
    # What the released programs draw: standard deviations of each kind of weights, three blocks deep.
    "sparse": {
        "qkv": (0.125 / D) ** 0.5, "out": (0.125 / D / 6) ** 0.5, "up": (0.125 / D) ** 0.5,
        "down": (0.125 / (4 * D) / 6) ** 0.5, "tokens": 0.01, "positions": 0.01 / 3**0.5, "logits": 0,
    },
    "axial": {
        "read": (9 * 6) ** -0.5, "qkv": D**-0.5, "out": 1e-5 * D**-0.5, "up": D**-0.5, "down": 1e-5 * D**-0.5,
        "tokens": 5 * D**-0.5, "positions": 5 * D**-0.5, "logits": 1e-5 * D**-0.5,
    },
    "routing": {
        "qkv": (0.2 / D) ** 0.5, "out": (0.2 / D) ** 0.5, "up": (0.4 / (3 * D)) ** 0.5, "down": (0.4 / (3 * D)) ** 0.5,
        "tokens": (0.4 / (V3 + D)) ** 0.5, "positions": 1, "logits": (0.2 / D) ** 0.5,
    },
    "perceiver": {
        "qkv": D**-0.5, "out": D**-0.5, "up": D**-0.5, "down": (4 * D) ** -0.5, "begin": D**-0.5, "tokens": CUT,
        "positions": CUT, "logits": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST)
def test_first_weights_are_the_programs(name: str) -> None:
    more = {"values": 64, "width": D, "depth": 4 if name == "axial" else 3}
    net = network(name, stirred=False, **more, **({"mlp_ratio": 2.0} if name == "routing" else {}))
    for kind, std in FIRST[name].items():
        drawn = [p.flatten() for n, p in net.named_parameters() if kind in n.split(".") and not n.endswith("bias")]
        assert float(torch.cat(drawn).detach().square().mean().sqrt()) == pytest.approx(std, rel=0.07), kind
    assert not any(p.any() for n, p in net.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize("name", ["sparse", "routing", "perceiver", "axial"])
def test_gradients_are_the_same_computed_again_with_dropout(name: str) -> None:
    """And what dropout draws in the next pass is what it would have drawn."""

    def gradients(recompute: bool) -> tuple[list[Tensor], Tensor]:
        net = network(name, dropout=0.3).train()
        for block in blocks(net):
            block.recompute = recompute
        noise = BatchNoise(0, 3, range(2, 4), 8)
        ask = net.training_pass if hasattr(net, "training_pass") else net
        with noise.for_networks(0):
            ask(tokens()).square().sum().backward()
            after = noise.kept(torch.empty(2, 50), 0.5)
        return [p.grad for p in net.parameters() if p.grad is not None], after

    (plain, drawn), (again, drawn_again) = gradients(False), gradients(True)
    for ours, theirs in zip(again, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert torch.equal(drawn, drawn_again)


def test_less_is_kept_where_it_is_computed_again() -> None:
    def kept(recompute: bool) -> int:
        net, bytes_kept = network("sparse").train(), 0
        for block in blocks(net):
            block.recompute = recompute

        def count(tensor: Tensor) -> Tensor:
            nonlocal bytes_kept
            bytes_kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            net(tokens())
        return bytes_kept

    assert kept(True) < kept(False) / 3


@EACH
def test_it_describes_itself(name: str) -> None:
    net = network(name)
    again = build(json.loads(json.dumps(describe(net))))
    assert again.config == net.config  # type: ignore[union-attr]
    again.double().load_state_dict(net.state_dict())
    torch.testing.assert_close(again.eval()(tokens()), net(tokens()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: SparseTransformerConfig(**SIZES, layers=("far",)),
            r"layers is \('far',\); it must be a list of dense",
        ),
        (lambda: SparseTransformerConfig(**SIZES, layers=()), "layers is"),
        (lambda: SparseTransformerConfig(**SIZES, layers=("summary",), cells=5), "cells is 5; it must be a divisor of"),
        (lambda: SparseTransformerConfig(**SIZES, combine="union"), "to be united"),
        (
            lambda: SparseTransformerConfig(**{**SIZES, "heads": 1}, layers=("local", "strided"), combine="heads"),
            "heads",
        ),
        (lambda: SparseTransformerConfig(**SIZES, key_ratio=0.3), "key_ratio is 0.3"),
        (lambda: SparseTransformerConfig(**SIZES, kernel="fast"), "kernel is 'fast'"),  # type: ignore[arg-type]
        (lambda: SparseTransformerConfig(**{**SIZES, "length": 47}), "length is 47; it must be a square number times"),
        (lambda: RoutingTransformerConfig(**SIZES, routing_heads=5), "routing_heads is 5; it must be at most heads, 4"),
        (lambda: RoutingTransformerConfig(**SIZES, decay=1.0), "decay is 1.0"),
        (lambda: RoutingTransformerConfig(**SIZES, selection="both"), "selection is 'both'"),  # type: ignore[arg-type]
        (lambda: PerceiverARConfig(**SIZES, latents=4, stride=5), "stride is 5; it must be at most the latents, 4"),
        (lambda: AxialTransformerConfig(**{**SIZES, "depth": 3}), "encoder_depth is 3; it must be an even number"),
    ],
)
def test_a_wrong_value_is_named(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        make()


@pytest.mark.parametrize("name", PAPERS)
def test_another_number_of_tokens_is_named(name: str) -> None:
    with pytest.raises(UserError, match=r"tokens are \[2, 7\]; this network takes \[N, 48\]"):
        network(name)(tokens()[:, :7])
