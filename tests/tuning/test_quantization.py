"""AAC and ABN on small networks: closed forms, identities, and what calibrates what."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.models.classifier import Classifier
from imagewright.networks import SongUNet, SongUNetConfig, WideResNet
from imagewright.networks.quantized import Quantized, Simulated, layers_of, simulate, store
from imagewright.networks.wide_resnet import WideResNetConfig
from imagewright.noise import StepNoise
from imagewright.tuning import quantization as q
from imagewright.tuning import synthesis as s
from imagewright.types import Condition, Encoding, UserError


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    """Untrained, float64, with statistics of noise in its norms."""
    torch.manual_seed(0)
    network = WideResNet(WideResNetConfig(img_resolution=8, in_channels=1, num_classes=3, blocks=1, widen=1))
    model = Classifier(network).double().train()
    for _ in range(20):
        model(drawn(64, 1, 8, 8, seed=int(torch.randint(1000, ()))))
    return model.eval().requires_grad_(False)


def calls(model: Classifier, pictures: Tensor) -> list[q.Call]:
    ((_, found),) = q.recorded(model, lambda: model(pictures))
    return found


def changed(model: Classifier, **told: Any) -> tuple[Classifier, q.Call]:
    """A simulated copy with ranges, and the call that they are of."""
    model, call = copy.deepcopy(model), q.joined(calls(model, drawn(96, 1, 8, 8)))
    simulate(model.network, Quantized(**told))
    if told.get("activation_bits"):
        q.measure_ranges(model.network, call)
    return model, call


def statistics(model: nn.Module) -> list[Tensor]:
    return [t for norm in q.batch_norms(model) for t in (norm.running_mean, norm.running_var)]


def test_ranges_are_the_least_and_greatest_inputs_of_the_float_network(classifier: Classifier) -> None:
    model, call = changed(classifier, bits=2, activation_bits=8)
    layers, seen = dict(layers_of(classifier.network)), {}
    handles = [
        layer.register_forward_pre_hook(lambda m, a, n=name: seen.update({n: a[0].aminmax()}))
        for name, layer in layers.items()
    ]
    classifier.network(*call)
    for handle in handles:
        handle.remove()
    for name, layer in layers_of(model.network):
        low, high = (0.0, 0.0) if name == "first" else seen[name]
        assert (float(layer.low), float(layer.high)) == pytest.approx((float(low), float(high))), name
    assert float(model.network.blocks[0].two.low) == 0  # behind a ReLU


def test_abn_is_the_identity_where_nothing_is_quantized(classifier: Classifier) -> None:
    """Paired whatever the pictures; re-estimated once the statistics are those of the pictures."""
    model, call = copy.deepcopy(classifier), q.joined(calls(classifier, 3 * drawn(64, 1, 8, 8) + 1))
    q.pair_norms(model.network, classifier.network, call)
    torch.testing.assert_close(statistics(model), statistics(classifier), rtol=1e-9, atol=1e-12)
    q.reestimate(model.network, call)
    once = [t.clone() for t in statistics(model)]
    assert any(not torch.allclose(a, b) for a, b in zip(once, statistics(classifier), strict=True))
    q.reestimate(model.network, call)
    torch.testing.assert_close(statistics(model), once)
    assert not any(norm.training or norm.momentum is None for norm in q.batch_norms(model))


class Shifted(nn.Conv2d):
    """Adds an error of mean 2 and variance 9 to each channel: a stand-in for what quantizing does."""

    def forward(self, x: Tensor) -> Tensor:
        answer = super().forward(x)
        error = drawn(*answer.shape, seed=5)
        error = (error - error.mean((0, 2, 3), keepdim=True)) / error.std((0, 2, 3), correction=0, keepdim=True)
        return answer + 2 + 3 * error


@pytest.mark.parametrize("paired", [True, False])
def test_abn_undoes_an_error_of_known_mean_and_variance(paired: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)).double()
    shifted = nn.Sequential(Shifted(2, 4, 1), nn.BatchNorm2d(4)).double()
    x = drawn(64, 2, 8, 8)
    plain[1].momentum = None
    plain(x)
    shifted.load_state_dict(plain.state_dict())
    plain.eval(), shifted.eval()
    assert shifted(x).mean().abs() > 1
    if paired:
        q.pair_norms(shifted, plain, (x,))  # type: ignore[arg-type]
    else:
        q.reestimate(shifted, (x,))  # type: ignore[arg-type]
    answer = shifted(x)
    torch.testing.assert_close(answer.mean((0, 2, 3)), torch.zeros(4).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(answer.var((0, 2, 3), correction=0), torch.ones(4).double(), rtol=0, atol=1e-3)


def test_paired_layers_have_the_float_ones_moments(classifier: Classifier) -> None:
    """Every linear map with a bias, exactly, and what is folded in stays when the weights are stored."""
    torch.manual_seed(0)
    config = SongUNetConfig(
        img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1
    )
    network = SongUNet(config).double().eval().requires_grad_(False)
    for _, layer in layers_of(network):
        layer.weight.normal_(std=0.2)
    call: q.Call = (drawn(16, 1, 8, 8), drawn(16), Condition())
    quantized = copy.deepcopy(network)
    simulate(quantized, Quantized(bits=3))
    last = [layer for _, layer in layers_of(network)][-1]

    def moments(net: nn.Module, layer: nn.Module) -> tuple[Tensor, Tensor]:
        (found,) = q._moments([layer], lambda: net(*call), of_inputs=False)
        return found

    before = moments(network, last)
    worse = moments(quantized, [layer for _, layer in layers_of(quantized)][-1])
    q.pair_layers(quantized, network, call)
    mended = moments(quantized, [layer for _, layer in layers_of(quantized)][-1])
    torch.testing.assert_close(mended, before, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(worse[1], before[1], rtol=0.01)
    answer = quantized(*call)
    store(quantized)
    torch.testing.assert_close(quantized(*call), answer)


def test_a_channels_gain_is_two_at_most_and_its_bias_gives_the_mean_back() -> None:
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Conv2d(2, 4, 1)).double().requires_grad_(False), drawn(16, 2, 4, 4)
    factor = torch.tensor([1 / 8, 8, 1 / 1.5, 1], dtype=torch.float64)
    other = copy.deepcopy(plain)
    other[0].weight.mul_(factor.view(-1, 1, 1, 1))
    other[0].bias.copy_(drawn(4))
    q.pair_layers(other, plain, (x,))  # type: ignore[arg-type]
    gained = factor * torch.tensor([2, 0.5, 1.5, 1], dtype=torch.float64)
    torch.testing.assert_close(other[0].weight, plain[0].weight * gained.view(-1, 1, 1, 1))
    torch.testing.assert_close(other(x).mean((0, 2, 3)), plain(x).mean((0, 2, 3)))


@pytest.mark.parametrize("norms", ["paired", "reestimate", "layers"])
def test_some_calls_clip_and_train_and_others_mend(
    classifier: Classifier, norms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Tensor] = {}
    for name, at in (("measure_ranges", 1), ("pair_norms", 2), ("reestimate", 1), ("pair_layers", 2), ("distil", 2)):
        monkeypatch.setattr(q, name, lambda *a, name=name, at=at, **_: told.update({name: a[at][0]}))
    network: Any = copy.deepcopy(classifier.network)
    clip, mend = ((drawn(k, 1, 8, 8), torch.arange(k) % 3.0, Condition()) for k in (6, 600))
    if norms == "layers":
        sizes = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": (1,)}
        network = SongUNet(SongUNetConfig(**sizes, num_blocks=1))  # type: ignore[arg-type]
    config = q.Quantization(buckets=2, norms="paired" if norms == "layers" else norms, updates=1)  # type: ignore[arg-type]
    q.quantize(network, [clip], config, norms=[mend], loss=q.answer_loss)
    mends = {"paired": "pair_norms", "reestimate": "reestimate", "layers": "pair_layers"}[norms]
    assert told.keys() == {"measure_ranges", mends, "distil"}
    assert len(told["measure_ranges"]) == len(told["distil"]) == 6 and network.edges.tolist() == [1.5]
    wanted = mend[0][torch.arange(256) * 600 // 256] if norms == "layers" else mend[0]
    torch.testing.assert_close(told[mends], wanted)


def test_norms_fold_into_the_layers_before_them(classifier: Classifier) -> None:
    model, call = changed(classifier, bits=4)
    q.pair_norms(model.network, classifier.network, call)
    store(model.network)
    conv, norm = model.network.first, model.network.norm
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = F.conv2d(call[0], conv.weight * factor[:, None, None, None], norm.bias - norm.running_mean * factor,
                      padding=1)  # fmt: skip
    torch.testing.assert_close(folded, norm(conv(call[0])), rtol=0, atol=1e-5)


def test_the_absolute_objective_pushes_on_where_cross_entropy_is_content() -> None:
    logits = torch.tensor([[40.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0])
    (content,) = torch.autograd.grad(F.cross_entropy(logits, label), logits)
    (pushed,) = torch.autograd.grad(s.absolute_loss(logits, label, torch.full((3,), 50.0)), logits)
    assert content.abs().max() < 1e-15
    assert pushed.tolist() == [[-1.0, 0.0, 0.0]]
    assert float(s.absolute_loss(logits.detach(), label, torch.full((3,), 30.0))) == 0


def test_pictures_match_statistics_and_respond(classifier: Classifier) -> None:
    config = s.Synthesis(iterations=10, batch=16)
    noise = s.noise_pictures(classifier, 32, StepNoise(0))
    matched = s.matched_pictures(classifier, 32, config, StepNoise(0))
    responding = s.responding_pictures(classifier, matched, 32, config, StepNoise(0))

    def fault(made: s.Made) -> float:
        norms, faults = q.batch_norms(classifier), []
        handles = [n.register_forward_pre_hook(lambda m, a: faults.append(float(s.mismatch(m, a[0])))) for n in norms]
        classifier(made.pictures)
        for handle in handles:
            handle.remove()
        return sum(faults)

    assert fault(matched) < 0.7 * fault(noise)
    assert responding.response > matched.response and responding.aim is not None
    assert all(float(m.pictures.abs().max()) <= 1 for m in (noise, matched, responding))
    again = s.matched_pictures(classifier, 32, config, StepNoise(0))
    assert torch.equal(again.pictures, matched.pictures)


def test_responding_pictures_by_hand(classifier: Classifier) -> None:
    """Two batches of two pictures, three steps of Adam whose rate falls by half a cosine."""
    model, config = copy.deepcopy(classifier), s.Synthesis(iterations=3, batch=2, weight=2.0)
    head: Any = model.network.head
    head.bias.copy_(torch.tensor([0.3, -0.4, 0.5]))
    matched = s.Made(drawn(3, 1, 8, 8).clamp(-1, 1), torch.zeros(3, dtype=torch.int64), 0.0)
    found = s.responding_pictures(model, matched, 4, config, StepNoise(0))
    start, labels = s._start(model, 4, StepNoise(0))
    aims = head.weight.norm(dim=1) * model(matched.pictures).pooled.norm(dim=1).max() + head.bias
    norms, faults, wanted = q.batch_norms(model), [], []
    handles = [n.register_forward_pre_hook(lambda m, a: faults.append(s.mismatch(m, a[0]))) for n in norms]
    for rows in (slice(0, 2), slice(2, 4)):
        x = start[rows].clamp(-1, 1).requires_grad_()
        optimizer = torch.optim.Adam([x])
        for k in range(3):
            optimizer.param_groups[0]["lr"] = 0.1 * (1, 0.75, 0.25)[k]
            faults.clear()
            said = model(x).logits[torch.arange(2), labels[rows]]
            x.grad = None
            (2 * sum(faults) / len(norms) + (aims[labels[rows]] - said).clamp_min(0).mean()).backward()
            optimizer.step()
            x.data.clamp_(-1, 1)
        wanted.append(x.detach())
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found.pictures, torch.cat(wanted))
    assert len({*labels.tolist()}) > 1 and torch.equal(found.labels, labels)
    assert found.aim == pytest.approx(float(aims[labels].mean()))
    assert found.response == pytest.approx(float(model(found.pictures).logits[torch.arange(4), labels].mean()))


def test_mismatch_is_nought_for_the_stored_statistics() -> None:
    norm, x = nn.BatchNorm2d(3).double(), drawn(4, 3, 5, 5)
    norm.running_mean.copy_(x.mean((0, 2, 3)))
    norm.running_var.copy_(x.var((0, 2, 3), correction=0))
    norm.eps = 0
    assert float(s.mismatch(norm, x)) == pytest.approx(0, abs=1e-20)
    deviation = norm.running_var.sqrt()[:, None, None]
    assert float(s.mismatch(norm, x + 2 * deviation)) == pytest.approx(4)
    centre = norm.running_mean[:, None, None]
    assert float(s.mismatch(norm, centre + 3 * (x - centre))) == pytest.approx(4)
    plain, unit = nn.BatchNorm2d(1, eps=3.0).double(), torch.tensor([1.0, 3.0]).double().view(2, 1, 1, 1)
    assert float(s.mismatch(plain, unit)) == pytest.approx(1)  # 2^2 / (1 + 3), of variance 1


def test_fine_tuning_nears_the_float_network(classifier: Classifier) -> None:
    model, call = changed(classifier, bits=2, activation_bits=4)
    labels = torch.zeros(96, dtype=torch.int64)
    loss = q.class_loss(labels)

    def far() -> float:
        with torch.no_grad():
            return float(loss(model.network(*call), classifier.network(*call), torch.arange(96)))

    before, norms = far(), [t.clone() for t in statistics(model)]
    q.distil(model.network, classifier.network, call, loss, updates=20, rate=1e-3, batch=32, seed=0)
    assert far() < 0.9 * before
    torch.testing.assert_close(statistics(model), norms, rtol=0, atol=0)
    assert all(isinstance(layer, Simulated) for _, layer in layers_of(model.network))


def test_classifiers_are_taught_the_asked_class_and_what_the_float_network_says() -> None:
    answer, original = drawn(3, 4), drawn(3, 4, seed=2)
    labels, rows = torch.tensor([3, 0, 2, 1, 1]), torch.tensor([4, 0, 2])
    made, told = (Encoding(pooled=x, logits=x) for x in (answer, original))
    found = q.class_loss(labels)(made, told, rows)
    soft = (original / 20).softmax(1)
    kl = (soft * (soft.log() - (answer / 20).log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(found, F.cross_entropy(answer, labels[rows]) + 400 * kl)
    torch.testing.assert_close(q.answer_loss(answer, original, rows), (answer - original).square().mean())


def test_each_bucket_has_the_range_of_its_own_images() -> None:
    torch.manual_seed(0)
    sizes = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": (1,)}
    network = SongUNet(SongUNetConfig(**sizes, num_blocks=1)).eval().requires_grad_(False)  # type: ignore[arg-type]
    call: q.Call = (torch.randn(6, 1, 8, 8), torch.tensor([0.0, 0, 1, 1, 2, 2]), Condition())
    told: dict[float, tuple[float, float]] = {}
    deep = [name for name, layer in layers_of(network) if isinstance(layer, nn.Conv2d)][2]
    for level in (0.0, 1.0, 2.0):
        rows = q.rows_of(call, call[1] == level)
        handle = network.get_submodule(deep).register_forward_pre_hook(
            lambda m, a, k=level: told.update({k: tuple(float(v) for v in a[0].aminmax())})
        )
        network(*rows)
        handle.remove()
    q.quantize(network, [call], q.Quantization(buckets=3, norms="none"), loss=q.answer_loss)
    assert network.edges.tolist() == [0.5, 1.5]
    layer = network.get_submodule(deep)
    for k, (low, high) in enumerate(told.values()):
        assert (float(layer.low[k]), float(layer.high[k])) == pytest.approx((low, high), rel=1e-5)
    assert len({float(h) for h in layer.high}) == 3
    bare = [name for name, each in layers_of(network) if not (each.high > each.low).any()]
    assert bare == [next(name for name, each in layers_of(network) if isinstance(each, nn.Conv2d))]  # not the label's
    layer.low, layer.high = torch.tensor([torch.inf, -1.0, -2.0]), torch.tensor([-torch.inf, 3.0, 2.0])
    q._settle(layer)  # a bucket that saw nothing
    assert layer.low.tolist() == [-2, -1, -2] and layer.high.tolist() == [3, 3, 2]


def test_chunks_are_of_equal_size() -> None:
    assert [s.stop - s.start for s in q.batches(130, 64)] == [43, 43, 44] and q.batches(5, 64) == [slice(0, 5)]


def test_buckets_part_the_noise_levels_evenly() -> None:
    label = torch.tensor([3.0, 1.0, 2.0, 4.0, 4.0, 1.0])
    call: q.Call = (torch.zeros(6, 1, 2, 2), label, Condition())
    assert q.edges_of(call, 2).tolist() == [2.5]  # type: ignore[union-attr]
    assert q.edges_of(call, 100).tolist() == [1.5, 2.5, 3.5]  # type: ignore[union-attr]
    assert q.edges_of((torch.zeros(6, 1, 2, 2),), 4) is None
    assert q.edges_of((torch.zeros(6, 4), torch.zeros(6, dtype=torch.int64)), 4) is None


def test_calls_are_joined_and_cut_with_their_conditions() -> None:
    calls = [(drawn(k, 2), Condition(label=torch.arange(k)), 7) for k in (2, 3)]
    x, cond, seven = q.joined(calls)
    assert len(x) == 5 and cond.label.tolist() == [0, 1, 0, 1, 2] and cond.augment is None and seven == 7
    assert q.rows_of((x, cond, seven), slice(1, 3))[1].label.tolist() == [1, 0]


def test_what_a_network_has_not_is_refused(classifier: Classifier) -> None:
    network = SongUNet(SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8))
    with pytest.raises(UserError, match="no batch norm to re-estimate"):
        q.quantize(network, [(drawn(2, 1, 8, 8),)], q.Quantization(norms="reestimate"), loss=q.answer_loss)
    with pytest.raises(UserError, match="ever asked as a whole"):
        q.recorded(network, lambda: None)
    with pytest.raises(UserError, match="shown no noise"):
        q.of_noise((torch.zeros(2, 4, dtype=torch.int64),), StepNoise(0))
    with pytest.raises(UserError, match="norms is 'all'"):
        q.Quantization(norms="all")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="iterations is 0"):
        s.Synthesis(iterations=0)
