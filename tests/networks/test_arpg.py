"""ARPG's network: what an answer depends on, the cache, where tokens and targets stand, larger grids, mistakes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from imagewright.models.description import build, describe
from imagewright.models.tokens import negative_log
from imagewright.networks import ARPG, ARPGConfig
from imagewright.networks.recompute import blocks
from imagewright.noise import BatchNoise
from imagewright.types import Condition, UserError

VALUES = 5
SIZES: dict[str, Any] = {
    "values": VALUES, "length": 16, "label_dim": 3, "width": 16, "depth": 4, "heads": 2, "hidden_multiple": 4,
}  # fmt: skip
COLOURS: dict[str, Any] = {**SIZES, "length": 48, "channels": 3}
EACH = pytest.mark.parametrize("sizes", [SIZES, COLOURS], ids=["grey", "colours"])
COND = Condition(label=torch.tensor([2, -1, 0]))


def network(*, stirred: bool = True, **sizes: Any) -> ARPG:
    """In float64, with weights so large that everything has an influence."""
    torch.manual_seed(0)
    net = ARPG(ARPGConfig(**{**SIZES, **sizes})).double().eval()
    if stirred:
        for p in net.parameters():
            p.data += 0.3 * torch.randn_like(p)
    return net.requires_grad_(False)


def tokens(length: int = 16, n: int = 3) -> Tensor:
    return torch.randint(VALUES, (n, length), generator=torch.Generator().manual_seed(1))


def orders(length: int = 16, n: int = 3) -> Tensor:
    return torch.rand(n, length, generator=torch.Generator().manual_seed(2)).argsort(1)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@EACH
def test_one_place_a_step_with_the_cache_gives_the_logits_of_training(sizes: dict[str, Any]) -> None:
    net, x, order = network(**sizes), tokens(sizes["length"]), orders(sizes["length"])
    whole, cache, found = net(x, None, COND, order), net.start(COND, 3), []
    for i in range(sizes["length"]):
        place = order[:, i : i + 1]
        found.append(net.ask(place, cache))
        net.show(x.gather(1, place), place, cache)
    same(torch.cat(found, 1), whole)


def test_tokens_shown_at_once_see_those_before_them_or_each_other() -> None:
    net, x, order = network(), tokens(), orders()

    def answers(causal: bool, *sizes: int) -> Tensor:
        cache, done = net.start(COND, 3), 0
        for size in sizes:
            places = order[:, done : done + size]
            net.show(x.gather(1, places), places, cache, causal=causal)
            done += size
        return net.ask(order, cache)

    one_by_one = answers(False, *[1] * 7)
    same(answers(True, 3, 4), one_by_one)
    together = answers(False, 3, 4)
    assert (together - one_by_one).abs().max() > 1e-3
    same(
        answers(False, 7),
        net(x.scatter(1, order[:, 7:], VALUES), None, COND).gather(1, order[..., None].expand(-1, -1, 5)),
    )


def test_a_place_is_answered_alike_whatever_else_is_asked() -> None:
    net, x, order = network(), tokens(), orders()
    cache = net.start(COND, 3)
    net.show(x.gather(1, order[:, :4]), order[:, :4], cache)
    asked = order[:, 4:12]
    whole = net.ask(asked, cache)
    same(net.ask(asked.flip(1), cache), whole.flip(1))
    same(net.ask(asked[:, 2:3], cache), whole[:, 2:3])
    same(net.ask(order, cache)[:, 4:12], whole)


@EACH
def test_no_answer_depends_on_its_own_token_or_on_later_ones(sizes: dict[str, Any]) -> None:
    length = sizes["length"]
    net, order = network(**sizes), orders(length, 1)
    changed = tokens(length, 1).repeat(length + 1, 1)
    for j in range(length):  # a copy for each place of the order, changed there, and one as it is
        changed[j, order[0, j]] = (changed[j, order[0, j]] + 1) % VALUES
    answers = net(changed, order=order.expand(length + 1, -1))
    reached = (answers[:-1] - answers[-1]).abs().amax(2) > 1e-13
    assert not reached.tril().any()
    assert reached.triu(1).sum() == length * (length - 1) / 2  # every token reaches every later answer


def answers(net: ARPG, places: list[int], asked: list[int]) -> Tensor:
    """At some places, given the first tokens at others."""
    cache = net.start(n=1)
    net.show(tokens()[:1, : len(places)], torch.tensor([places]), cache)
    return net.ask(torch.tensor([asked]), cache)[0]


def test_answers_depend_on_where_the_target_and_where_the_tokens_stand() -> None:
    base = answers(network(), [0, 5], [9, 10])
    assert (base[0] - base[1]).abs().max() > 1e-3  # two targets
    assert (answers(network(), [0, 6], [9])[0] - base[0]).abs().max() > 1e-3  # a token elsewhere


def test_with_the_released_zero_key_only_differences_of_positions_count() -> None:
    """The frame is known from what was shown alone; a class that is not turned tells it from the second token on."""
    same(answers(network(), [1, 6], [10, 11]), answers(network(), [0, 5], [9, 10]))
    released, plain = (network(class_turn=turn) for turn in ("zero", "none"))
    first = released.ask(torch.arange(16)[None], released.start(n=1))[0]
    same(first, first[:1].expand_as(first))
    assert (answers(plain, [1, 6], [10, 11]) - answers(plain, [0, 5], [9, 10])).abs().max() > 1e-3


def test_the_class_has_a_zero_key_as_released_or_is_not_turned() -> None:
    def first_key(**more: Any) -> Tensor:
        return network(**more).start(COND, 3).shared.read()[0][:, :, 0]

    assert not first_key().any()
    plain = first_key(class_turn="none")
    assert plain.abs().min() > 0
    assert (plain[0] - plain[1]).abs().max() > 1e-3  # of each class its own
    # What the zero key hides, the value tells.
    answers = network()(tokens(n=1).expand(3, -1), None, COND)
    assert (answers[0] - answers[1]).abs().max() > 1e-3


def test_channels_of_a_place_are_told_apart() -> None:
    net, x = network(**COLOURS), tokens(48, 1)
    cache = net.start(n=1)
    net.show(x[:, :3], torch.tensor([[0, 1, 2]]), cache)
    first, second, third = net.ask(torch.tensor([[9, 10, 11]]), cache)[0]
    assert min((first - second).abs().max(), (second - third).abs().max()) > 1e-3
    other = net.start(n=1)
    net.show(x[:, :3], torch.tensor([[1, 0, 2]]), other)
    assert (net.ask(torch.tensor([[9]]), other)[0, 0] - first).abs().max() > 1e-3


def test_a_larger_grid_has_the_trained_positions_among_its_own() -> None:
    net, x, places = network(), tokens(), torch.tensor([[0, 5, 11]])
    rows, columns = places // 4, places % 4
    small, large = net.start(n=1), net.start(n=1, expansion=2)
    finer = rows * 2 * 8 + columns * 2
    net.show(x[:1, :3], places, small)
    net.show(x[:1, :3], finer, large)
    asked = torch.tensor([[1, 2, 15]])
    same(net.ask(asked // 4 * 16 + asked % 4 * 2, large), net.ask(asked, small))
    between = net.ask(torch.arange(64)[None], large)[0]
    assert len(between.unique(dim=0)) == 64


@EACH
def test_first_answers_are_even_and_first_weights_the_programs(sizes: dict[str, Any]) -> None:
    net, x, order = network(stirred=False, **sizes), tokens(sizes["length"]), orders(sizes["length"])
    nats = negative_log(net(x, None, COND, order), x.gather(1, order))
    assert (nats == math.log(VALUES)).all()
    large = network(stirred=False, width=128, values=64)
    for name, p in large.named_parameters():
        if p.ndim == 2 and name != "logits.weight":
            assert float(p.std()) == pytest.approx(0.02, rel=0.1), name
        assert p.ndim == 2 or bool((p == 1).all()), name
    assert not any(name.endswith("bias") for name, _ in large.named_parameters())


def test_gradients_are_the_same_computed_again_with_dropout() -> None:
    def gradients(recompute: bool) -> list[Tensor]:
        net = network(dropout=0.3, embedding_dropout=0.3).train().requires_grad_(True)
        for block in blocks(net):
            block.recompute = recompute
        with BatchNoise(0, 3, range(2, 5), 8).for_networks(0):
            net.training_pass(tokens()).square().sum().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(list(network().parameters()))
    for ours, theirs in zip(again, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_dropout_is_on_the_content_and_on_both_branches() -> None:
    net, x = network(dropout=0.0, embedding_dropout=0.5).train(), tokens()
    kept = net(x, order=orders())
    assert (net(x, order=orders()) - kept).abs().max() > 1e-3
    assert torch.equal(net.eval()(x, order=orders()), net(x, order=orders()))


@EACH
def test_it_describes_itself(sizes: dict[str, Any]) -> None:
    net = network(**sizes)
    again = build(json.loads(json.dumps(describe(net))))
    assert again.config == net.config  # type: ignore[union-attr]
    again.double().load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(tokens(sizes["length"])), net(tokens(sizes["length"])))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"depth": 3}, "depth is 3; it must be even"),
        ({"heads": 3}, "heads is 3; it must be a divisor of width, 16, that leaves a multiple of 4"),
        ({"heads": 8}, "heads is 8"),
        ({"length": 15}, "length is 15; it must be a square number times channels, 1"),
        ({"class_turn": "half"}, "class_turn is 'half'; it must be zero, none"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"embedding_dropout": -0.1}, "embedding_dropout is -0.1"),
        ({"hidden_multiple": 0}, "hidden_multiple is 0; it must be an integer >= 1"),
        ({"rotary_base": 1.0}, "rotary_base is 1.0; it must be above 1"),
        ({"init_std": 0.0}, r"init_std is 0.0; it must be in \(0, 1\)"),
        ({"values": True}, "values is True; it must be an integer >= 2"),
    ],
)
def test_a_wrong_value_is_named(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        ARPGConfig(**{**SIZES, **changed})


def test_other_tokens_and_classes_are_named() -> None:
    net = network()
    ask: Callable[[], Any]
    for ask, match in (
        (lambda: net(tokens()[:, :7]), r"tokens are \[3, 7\]; this network takes \[N, 16\]"),
        (lambda: net(tokens(), None, Condition(label=torch.tensor([0, 1, 3]))), "label 3 is no class"),
        (lambda: net.start(Condition(label=torch.tensor([-2])), 1), "label -2 is no class"),
    ):
        with pytest.raises(UserError, match=match):
            ask()
