"""Axial, Sparse and Routing Transformer, Perceiver AR: losses, what a step moves, published sizes, recipes, resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.cli.dry_run import StandIns
from imagewright.methods.autoregressive import Autoregressive
from imagewright.methods.axial_transformer import AxialLikelihood
from imagewright.methods.perceiver_ar import PerceiverLikelihood, crop_ends
from imagewright.methods.routing_transformer import RoutingLikelihood
from imagewright.models.causal import CausalTokenModel
from imagewright.models.files import ModelFile, load_model, save_model
from imagewright.models.tokens import PixelCodec, negative_log
from imagewright.networks import (
    AxialTransformer,
    AxialTransformerConfig,
    PerceiverAR,
    PerceiverARConfig,
    RoutingTransformer,
    RoutingTransformerConfig,
    SparseTransformer,
    SparseTransformerConfig,
)
from imagewright.networks.routing_transformer import Routing
from imagewright.noise import BatchNoise, ImageNoise, StepNoise
from imagewright.recipes import RECIPES
from imagewright.samplers import Raster
from imagewright.training.experiment import Experiment, assemble
from imagewright.training.learners import Learner
from imagewright.types import Batch, Clock, Condition, DataSpec, Trained, Update, UserError

SPEC = DataSpec(name="test", resolution=4, channels=3, num_classes=2)
CODEC = PixelCodec(4, 3, 8)
SIZES: dict[str, Any] = {
    "values": 8, "length": 48, "channels": 3, "label_dim": 2, "width": 16, "depth": 2, "heads": 2
}  # fmt: skip
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "axial": lambda: AxialTransformer(AxialTransformerConfig(**SIZES)),
    "sparse": lambda: SparseTransformer(SparseTransformerConfig(**SIZES, layers=("strided", "local"))),
    "routing": lambda: RoutingTransformer(
        RoutingTransformerConfig(**SIZES, routing_heads=1, clusters=4, window=9, block=12)
    ),
    "perceiver": lambda: PerceiverAR(PerceiverARConfig(**SIZES, latents=10)),
}
METHODS: dict[str, Any] = {
    "axial": AxialLikelihood(), "sparse": Autoregressive(), "routing": RoutingLikelihood(),
    "perceiver": PerceiverLikelihood(),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", METHODS)


def network(name: str) -> Any:
    torch.manual_seed(0)
    net = NETWORKS[name]()
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return net


def images_and_labels(n: int = 4) -> tuple[Tensor, Condition]:
    tokens = torch.randint(8, (n, 48), generator=torch.Generator().manual_seed(2))
    return CODEC.decode(tokens), Condition(label=torch.arange(n) % 2)


def update(name: str, seed: int = 0, n: int = 4, method: Any = None) -> tuple[Update, CausalTokenModel]:
    method = method or METHODS[name]
    parts = method.parts(network=network(name), codec=CODEC, spec=SPEC)
    images, cond = images_and_labels(n)
    (event,) = method.step(parts, Batch(images, cond), StepNoise(seed), Clock(0, 0, 1))
    return event, parts.model


# --- losses -----------------------------------------------------------------------------------------------------------


def test_the_axial_loss_is_bits_per_dim_in_expectation_over_channels() -> None:
    method, parts = METHODS["axial"], None
    parts = method.parts(network=network("axial"), codec=CODEC, spec=SPEC)
    images, cond = images_and_labels()
    with torch.no_grad():
        whole = parts.model.nll(CODEC.encode(images), cond) / 48 / math.log(2)

    class Channel:
        """A draw that is told."""

        def __init__(self, channel: int) -> None:
            self.channel = channel

        def integers(self, high: int, like: Tensor) -> Tensor:
            assert high == 3
            return torch.full_like(like, self.channel)

    losses = []
    for channel in range(3):
        (event,) = method.step(parts, Batch(images, cond), Channel(channel), Clock(0, 0, 1))
        losses.append(event.loss.detach())
    torch.testing.assert_close(torch.stack(losses).mean(0).double(), whole, rtol=1e-5, atol=0)
    assert (losses[0] - losses[1]).abs().min() > 1e-4
    drawn = StepNoise(0).integers(3, torch.zeros(300, dtype=torch.int64))
    assert set(drawn.tolist()) == {0, 1, 2}


def test_the_sparse_loss_is_the_mean_of_nats() -> None:
    event, model = update("sparse")
    images, cond = images_and_labels()
    torch.testing.assert_close(event.loss.double(), model.nll(CODEC.encode(images), cond) / 48, rtol=1e-5, atol=0)


def test_the_routing_loss_adds_the_commitment_twice_over_blocks() -> None:
    event, model = update("routing", method=RoutingLikelihood(beta=0.5))
    plain, _ = update("routing", method=RoutingLikelihood(beta=0.0))
    commitment = event.parts["commitment"]
    torch.testing.assert_close(event.loss, plain.loss + 2 * 0.5 * commitment)
    routing = model.network.routings()[0].train()
    query = torch.randn(3, 1, 48, 8)
    routing(query, query, query)
    x = F.layer_norm(query, (8,), eps=1e-6)
    nearest = routing.centroids[0][(x @ routing.centroids.mT).argmax(-1)[:, 0]]
    torch.testing.assert_close(routing.commitment, (x[:, 0] - nearest).square().flatten(1).mean(1))
    assert all(p.grad is None for p in [routing.centroids]) and not routing.centroids.requires_grad


def test_the_perceivers_loss_is_a_sum_over_targets_with_a_pull_on_the_normaliser() -> None:
    event, model = update("perceiver", seed=3)
    images, cond = images_and_labels()
    tokens = CODEC.encode(images)
    ends = crop_ends(tokens, 10, StepNoise(3))
    logits, places = model.network.window(tokens, ends, cond)
    assert torch.equal(places, ends[:, None] - 10 + torch.arange(10))
    expected = (negative_log(logits, tokens.gather(1, places)) + 1e-4 * logits.logsumexp(2).square()).sum(1)
    torch.testing.assert_close(event.loss, expected)
    plain = event.parts["bits_per_token"] * math.log(2) * 10  # without the pull
    assert (event.loss - plain).min() > 1e-4


def test_crops_end_anywhere_from_the_latents_on() -> None:
    ends = crop_ends(torch.zeros(4000, 13), 10, BatchNoise(0, 0, range(4000), 4000))
    counts = torch.bincount(ends, minlength=14)
    assert not counts[:10].any() and ((counts[10:] - 1000).abs() < 5 * math.sqrt(1000)).all()
    assert (crop_ends(torch.zeros(5, 8), 10, StepNoise(0)) == 8).all()  # fewer tokens than latents


@EACH
def test_gradients_reach_everything(name: str) -> None:
    event, model = update(name, seed=1)
    event.loss.sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@EACH
def test_another_network_is_refused(name: str) -> None:
    if name == "sparse":
        return  # its loss is any causal network's
    other = "sparse" if name != "sparse" else "axial"
    with pytest.raises(UserError, match=f"network is a {type(network(other)).__name__}; this method trains"):
        METHODS[name].parts(network=network(other), codec=CODEC, spec=SPEC)


# --- routing ----------------------------------------------------------------------------------------------------------


def routing(k: int, w: int, heads: int = 2, width: int = 6, decay: float = 0.9) -> Routing:
    torch.manual_seed(1)
    return Routing(heads, k, w, width, decay, "global").double()


def test_one_cluster_of_all_is_dense_attention_but_for_the_share() -> None:
    query, value = torch.randn(2, 2, 11, 6).double(), torch.randn(2, 2, 11, 6).double()
    x = F.layer_norm(query, (6,), eps=1e-6)
    dense = F.scaled_dot_product_attention(x, x, value, is_causal=True, scale=1.0)
    for mode in (True, False):
        torch.testing.assert_close(routing(1, 11).train(mode)(query, query, value), dense / 1.01, rtol=0, atol=1e-12)


def test_centroids_move_once_a_step_by_all_that_was_seen() -> None:
    net, halves = routing(3, 4), torch.randn(2, 2, 2, 9, 6).double()
    before = net.centroids.clone()
    net.train()
    for query in halves:
        net(query, query, query)
        assert torch.equal(net.centroids, before)
    x = F.layer_norm(halves.flatten(0, 1), (6,), eps=1e-6)
    nearest = (x @ before.mT).argmax(-1)
    hot = F.one_hot(nearest, 3).double()
    count = 0.1 * hot.sum((0, 2))
    total = 0.9 * before + 0.1 * torch.einsum("nhlk,nhld->hkd", hot, x)
    whole = count.sum(1, keepdim=True)
    expected = total / ((count + 1e-5) / (whole + 3e-5) * whole)[..., None]
    net.settle(lambda tensor: tensor)
    torch.testing.assert_close(net.centroids, expected, rtol=1e-6, atol=0)
    net.eval()(halves[0], halves[0], halves[0])
    net.settle(lambda tensor: tensor)  # nothing was noted
    torch.testing.assert_close(net.ema_count, 0.9 * count, rtol=1e-6, atol=0)


def test_centroids_are_of_all_processes() -> None:
    """What two processes note is summed: the same as one that saw everything."""
    queries = torch.randn(2, 3, 2, 9, 6).double()
    alone, shares = routing(3, 4).train(), [routing(3, 4).train() for _ in range(2)]
    for query, share in zip(queries, shares, strict=True):
        alone(query, query, query)
        share(query, query, query)
    noted = sum(torch.cat([s.count[..., None], s.total], -1) for s in shares)
    for share in shares:
        share.settle(lambda tensor: noted)
    alone.settle(lambda tensor: tensor)
    for share in shares:
        torch.testing.assert_close(share.centroids, alone.centroids)


def test_a_learner_settles_what_its_module_noted() -> None:
    event, model = update("routing")
    training = RECIPES["routing-digits"]().training
    learner = Learner(Trained(module=model), training, torch.device("cpu"))
    before = model.network.routings()[0].centroids.clone()
    learner.backward(event.loss.mean(), last=True)
    learner.gradient()
    assert not torch.equal(model.network.routings()[0].centroids, before)
    assert not model.network.routings()[0].count.any()


def test_members_are_in_order_and_see_nothing_later() -> None:
    query = torch.randn(1, 2, 30, 6).double()
    net = routing(4, 7).eval()
    for selection in ("global", "causal"):
        net.asked = selection  # type: ignore[assignment]
        sees = net(query, query, torch.eye(30).double().expand(1, 2, -1, -1))
        assert not sees.triu(1).any() and (sees.sum(-1) <= 1).all()
        assert ((sees > 0).sum(-1) > 0).any()


def test_members_of_the_whole_sequence_let_later_places_decide() -> None:
    """The published selection: no value from later, but who is selected; the strictly causal one is not moved."""
    net, query = routing(4, 5).eval(), torch.randn(1, 2, 24, 6).double()
    other = query.clone()
    other[:, :, -4:] = torch.randn(1, 2, 4, 6).double() * 3
    moved = {}
    for selection in ("global", "causal"):
        net.asked = selection  # type: ignore[assignment]
        moved[selection] = float((net(query, query, query) - net(other, query, query))[:, :, :-4].abs().max())
    assert moved["causal"] == 0 and moved["global"] > 1e-3


def test_both_selections_agree_where_clusters_hold_everything() -> None:
    net, query = routing(3, 24).eval(), torch.randn(1, 2, 24, 6).double()
    answers = []
    for selection in ("global", "causal"):
        net.asked = selection  # type: ignore[assignment]
        answers.append(net(query, query, query))
    torch.testing.assert_close(*answers, rtol=0, atol=1e-12)


# --- Perceiver AR -----------------------------------------------------------------------------------------------------


def test_with_as_many_latents_as_places_a_window_is_the_whole_answer() -> None:
    net = PerceiverAR(PerceiverARConfig(**SIZES, latents=48)).double().eval()
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    tokens = torch.randint(8, (2, 48))
    logits, places = net.window(tokens, torch.full((2,), 48))
    torch.testing.assert_close(logits, net(tokens), rtol=0, atol=1e-12)
    assert torch.equal(places[0], torch.arange(48))


def test_evaluation_is_by_windows_of_latents() -> None:
    """Place by place the windows that training would have shown: N - stride latents before at least."""
    net = network("perceiver").double().eval()
    tokens = torch.randint(8, (1, 48))
    whole = net(tokens)
    for first, last in ((0, 10), (10, 15), (15, 20), (45, 48)):
        end = max(10, last) if last < 48 else 48
        latents = 10 if last < 48 else 8
        net.config = replace(net.config, latents=latents)
        logits, _ = net.window(tokens, torch.tensor([end]))
        net.config = replace(net.config, latents=10)
        torch.testing.assert_close(logits[:, first - last :], whole[:, first:last], rtol=0, atol=1e-12)


def test_inputs_may_be_hidden_in_training_and_own_ones_are_not() -> None:
    net = PerceiverAR(PerceiverARConfig(**SIZES, latents=10, input_dropout=0.9)).double()
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    tokens, ends = torch.randint(8, (2, 48)), torch.full((2,), 48)
    shown = net.eval().window(tokens, ends)[0]
    torch.manual_seed(0)
    hidden = net.train().window(tokens, ends)[0]
    assert torch.isfinite(hidden).all() and (shown - hidden).abs().max() > 1e-3


def test_what_a_window_costs_in_depth_is_independent_of_the_input() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(side: int) -> int:
        sizes = {**SIZES, "length": side * side, "channels": 1, "label_dim": 0}
        net = PerceiverAR(PerceiverARConfig(**sizes, latents=16))
        counter = FlopCounterMode(display=False)
        with counter:
            for block in net.blocks:
                block(torch.zeros(1, 16, 16))
        return counter.get_total_flops()

    assert flops(8) == flops(32) > 0


# --- sampling ---------------------------------------------------------------------------------------------------------


@EACH
def test_the_cache_draws_the_same_tokens(name: str) -> None:
    model = CausalTokenModel(network(name).double().eval(), CODEC)
    latents, cond = torch.zeros(3, 1), Condition(label=torch.tensor([0, 1, -1]))
    drawn = [Raster(cache=c)(model, latents, cond, noise=ImageNoise(3, range(3))) for c in (True, False)]
    torch.testing.assert_close(*drawn, rtol=0, atol=0)
    assert len({image.numpy().tobytes() for image in drawn[0]}) == 3


@EACH
def test_known_tokens_stay_and_the_others_are_drawn(name: str) -> None:
    model = CausalTokenModel(network(name).double().eval(), CODEC)
    known = torch.randint(8, (2, 48), generator=torch.Generator().manual_seed(0))
    unknown = torch.arange(48) >= 30
    given = known.masked_fill(unknown, 8)
    filled = Raster().fill(model, given, noise=ImageNoise(1, range(2)))
    assert torch.equal(filled[:, ~unknown], known[:, ~unknown]) and (filled < 8).all()
    assert not torch.equal(filled, Raster().fill(model, given, noise=ImageNoise(2, range(2))))


@EACH
def test_a_model_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    model = CausalTokenModel(network(name), CODEC).eval()
    save_model(tmp_path, ModelFile(model=model, spec=SPEC))
    tokens = CODEC.encode(images_and_labels()[0])
    again = load_model(tmp_path).model
    torch.testing.assert_close(again.nll(tokens), model.nll(tokens), rtol=0, atol=0)  # type: ignore[operator]


# --- recipes ----------------------------------------------------------------------------------------------------------

PUBLISHED = {
    # The released programs' own layers, written out: what a block has, times their number, then input and logits.
    "sparse-cifar10": 128 * 461_312 + 2 * 256 * 256 + 67 * 256 + 256 + 512,
    "sparse-imagenet64": 151_645_184,
    "axial-imagenet64": 24 * 2048 * (6 * 2048 + 10) + (6 * 9 + 1 + 4 * 64 + 256 + 2) * 2048 + 256 * 2049,
    "perceiver-imagenet64": 770_083_072,
    "routing-imagenet64": 196_649_216,  # without the keys that nothing reads, and a second mixing of a head's numbers
}


def published(name: str) -> nn.Module:
    with torch.device("meta"):
        return assemble(RECIPES[name](), sources=StandIns()).parts.roles["model"].module.network


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_their_number_of_parameters(name: str) -> None:
    assert sum(p.numel() for p in published(name).parameters()) == PUBLISHED[name]


def test_the_published_sizes_are_those_that_the_papers_say() -> None:
    counts = {n: sum(p.numel() for p in published(n).parameters()) for n in ("sparse-cifar10", "sparse-imagenet64")}
    assert counts == {"sparse-cifar10": 59_196_928, "sparse-imagenet64": 151_645_184}


def test_published_rates_are_the_programs() -> None:
    """Ramps of Axial, Sparse and Perceiver; the two last ones' cosines; Routing has no ramp, and an inverse root."""
    rates = {
        "axial-imagenet64": {2_500: 1e-4, 5_000: 2e-4, 400_000: 2e-4},
        "sparse-cifar10": {7_500: 1.75e-4, 15_000: 3.5e-4, 217_500: 1.75e-4, 420_000: 0.0},
        "routing-cifar10": {1: 0.01, 5_000: 0.01, 10_000: 0.01, 40_000: 0.005},
        "routing-imagenet64": {1: 0.01, 5_000: 0.01, 10_000: 0.01, 40_000: 0.005},
        "perceiver-imagenet64": {5_000: 1.5e-4, 10_000: 3e-4, 700_000: 3e-4, 725_000: 1.5e-4},
    }
    for name, expected in rates.items():
        t = RECIPES[name]().training
        found = {step: t.optimizer.lr_at(step * t.batch, t.total_images) for step in expected}
        assert found == pytest.approx(expected, abs=1e-12), name


def test_small_recipes_are_the_baseline_but_for_network_and_loss() -> None:
    for suffix in ("digits", "emoji64-16", "emoji64-32"):
        base = RECIPES[f"causal-{suffix}"]()
        for paper in ("axial", "sparse", "routing", "perceiver"):
            run = RECIPES[f"{paper}-{suffix}"]()
            assert run.data == base.data
            lr = run.training.optimizer.lr
            assert run.training == replace(base.training, optimizer=replace(base.training.optimizer, lr=lr))
            network, theirs = (assemble(r).parts.roles["model"].module for r in (run, base))
            ratio = sum(p.numel() for p in network.parameters()) / sum(p.numel() for p in theirs.parameters())
            assert 0.94 < ratio < 1.07, (paper, suffix, ratio)


@pytest.mark.parametrize("name", ["axial", "sparse", "routing", "perceiver"])
def test_resuming_changes_no_bit(name: str, resumed_run: Callable[[Experiment], Path]) -> None:
    base = RECIPES[f"{name}-digits"]()
    small: dict[str, Any] = {"width": 16, "depth": 2 if name == "axial" else 1, "heads": 2}
    if name == "routing":
        small |= {"routing_heads": 1}
    sizes = {"total_images": 48, "batch": 16, "micro_batch": 8, "log_images": 16, "snapshot_images": 48}
    optimizer = replace(base.training.optimizer, kind="adafactor") if name == "routing" else base.training.optimizer
    recompute = name == "routing"
    training = replace(base.training, checkpoint_images=16, optimizer=optimizer, recompute=recompute, **sizes)
    resumed_run(replace(base, network=replace(base.network, **small), training=training))


@pytest.mark.parametrize("chunk", [1, 2000, 1 << 20])
def test_the_causal_selection_is_the_same_in_pieces(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of places, and of images where few places would be looked at together."""
    net, query = routing(4, 7).eval(), torch.randn(5, 2, 40, 6).double()
    whole = torch.cat([net(each, each, each) for each in query.split(1)])
    monkeypatch.setattr("imagewright.networks.routing_transformer.CHUNK", chunk)
    torch.testing.assert_close(net(query, query, query), whole, rtol=0, atol=1e-12)
