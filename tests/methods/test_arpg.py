"""ARPG's training: orders, loss, hidden classes; its likelihood; resume; the commands end to end, with no flag."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagewright.cli.main import main
from imagewright.data import open_images
from imagewright.methods.arpg import RandomOrders
from imagewright.methods.maskgit import hide_labels
from imagewright.models.random_order import RandomOrderModel, random_order
from imagewright.models.tokens import PixelCodec, negative_log
from imagewright.networks import ARPG, ARPGConfig, TokenTransformer, TokenTransformerConfig
from imagewright.noise import BatchNoise, StepNoise
from imagewright.pretrained import find_model
from imagewright.recipes import RECIPES
from imagewright.samplers import RandomizedParallel
from imagewright.training.experiment import Experiment, run_experiment
from imagewright.types import Batch, Clock, Condition, DataSpec, Update, UserError

SPEC = DataSpec(name="test", resolution=4, channels=1, num_classes=3)
CLOCK = Clock(step=0, images=0, total_images=1)
SMALL: dict[str, Any] = {"width": 8, "depth": 2, "heads": 2, "hidden_multiple": 4}


def network(values: int = 5, length: int = 16, **more: Any) -> ARPG:
    torch.manual_seed(0)
    net = ARPG(
        ARPGConfig(values=values, length=length, label_dim=3, dropout=0.0, embedding_dropout=0.0, **SMALL, **more)
    )
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return net.double()


def test_the_loss_is_the_mean_cross_entropy_of_an_image_in_an_order_of_its_own() -> None:
    method, codec = RandomOrders(), PixelCodec(4, 1, 5)
    parts = method.parts(network=network(), codec=codec, spec=SPEC)
    tokens = torch.randint(5, (6, 16), generator=torch.Generator().manual_seed(1))
    batch = Batch(codec.decode(tokens), Condition(label=torch.arange(6) % 3))
    (event,) = method.step(parts, batch, StepNoise(7), CLOCK)
    assert isinstance(event, Update) and event.part == "model" and event.loss.shape == (6,)
    noise = StepNoise(7)
    order = noise.uniform(tokens.double()).argsort(1)
    assert len({tuple(row.tolist()) for row in order}) == 6
    logits = parts.model.network(tokens, None, hide_labels(batch.cond, 0.1, noise), order)
    nats = -torch.log_softmax(logits, 2).gather(2, tokens.gather(1, order)[..., None])[..., 0]
    torch.testing.assert_close(event.loss, nats.mean(1))
    torch.testing.assert_close(event.parts["bits_per_token"], nats.mean(1).detach() / math.log(2))


def test_orders_are_uniform_and_new_in_every_step() -> None:
    tokens = torch.zeros(6000, 4, dtype=torch.int64)
    first, second = (random_order(tokens, BatchNoise(0, step, range(6000), 6000)) for step in (0, 1))
    assert (first != second).any(1).double().mean() > 0.9
    of_each = torch.unique(first, dim=0, return_counts=True)[1]
    assert len(of_each) == 24 and (of_each - 250).abs().max() < 5 * 250**0.5


def test_classes_are_hidden_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    plain = RandomOrderModel.in_order
    monkeypatch.setattr(
        RandomOrderModel, "in_order", lambda self, t, o, c: seen.append(c.label) or plain(self, t, o, c)
    )  # fmt: skip
    method, codec = RandomOrders(label_dropout=0.3), PixelCodec(4, 1, 5)
    parts = method.parts(network=network(), codec=codec, spec=SPEC)
    batch = Batch(torch.zeros(2000, 1, 4, 4), Condition(label=torch.ones(2000, dtype=torch.int64)))
    next(method.step(parts, batch, StepNoise(0), CLOCK))
    assert float((seen[0] == -1).double().mean()) == pytest.approx(0.3, abs=0.05)
    assert parts.model.label_dropout == 0.3
    without = RandomOrders().parts(network=network(), codec=codec, spec=replace(SPEC, num_classes=0))
    assert without.model.label_dropout == 0.0  # and guidance is refused


@torch.no_grad()
def test_in_one_order_the_likelihood_is_exact_and_the_mean_over_orders_bounds_that_of_drawing_one() -> None:
    model = RandomOrderModel(network(2, 4), PixelCodec(2, 1, 2)).eval()
    every = torch.tensor(list(itertools.product(range(2), repeat=4)))
    cond = Condition(label=torch.full((16,), 1))
    each = []
    for chosen in itertools.permutations(range(4)):
        order = torch.tensor(chosen).expand(16, -1)
        each.append(negative_log(model.in_order(every, order, cond), every.gather(1, order)).sum(1))
    nats = torch.stack(each)
    torch.testing.assert_close((-nats).exp().sum(1), torch.ones(24, dtype=torch.float64))
    own = -(torch.logsumexp(-nats, 0) - math.log(24))
    assert (nats.mean(0) - own).min() > 1e-4
    drawn = torch.stack([model.nll(every, cond, noise=StepNoise(seed)) for seed in range(300)])
    gaps = (drawn[:, :, None] - nats.T).abs()
    assert gaps.min(2).values.max() < 1e-12  # each is that of some order
    torch.testing.assert_close(drawn.mean(0), nats.mean(0), rtol=0, atol=0.15)
    # Sampling one token a step has the probabilities that the likelihood says.
    tokens = RandomizedParallel().fill(
        model, torch.full((8000, 4), 2), Condition(label=torch.ones(8000, dtype=torch.int64)), noise=StepNoise(5)
    )  # type: ignore[arg-type]
    shares = torch.bincount((tokens * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16) / 8000
    torch.testing.assert_close(shares.double(), (-own).exp(), rtol=0, atol=0.025)
    with pytest.raises(ValueError, match="drawn at random"):
        model.nll(every, cond)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"method\.label_dropout is 1\.5; it must lie in \[0, 1\]"):
        RandomOrders(label_dropout=1.5)
    other = TokenTransformer(TokenTransformerConfig(values=5, length=16, width=8, depth=1, heads=1))
    with pytest.raises(UserError, match="network is a TokenTransformer; this method trains an ARPG"):
        RandomOrders().parts(network=other, codec=PixelCodec(4, 1, 5), spec=SPEC)


def short(images: int) -> Experiment:
    base = RECIPES["arpg-digits"]()
    training = replace(base.training, total_images=images, batch=16, micro_batch=8, log_images=16,
                       snapshot_images=images, checkpoint_images=32)  # fmt: skip
    net = replace(base.network, **SMALL, dropout=0.1, embedding_dropout=0.1)
    return replace(base, network=net, training=training, sampler=RandomizedParallel(num_steps=3))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = RECIPES["vq-digits"]()
    net = replace(base.network, model_channels=4, codebook_size=7, codebook_dim=4)
    run = replace(base, network=net, method=replace(base.method, discriminator_width=4),
                  training=replace(base.training, total_images=16, batch=16))  # fmt: skip
    return run_experiment(run, tmp_path_factory.mktemp("arpg") / "vq")


@pytest.mark.parametrize("codec", ["codebook", "pixels"])
def test_resuming_changes_no_bit(codec: str, tokenizer: Path, resumed_run: Callable[[Experiment], Path]) -> None:
    folder = resumed_run(short(96).giving(tokenizer=str(tokenizer) if codec == "codebook" else None))
    model = find_model(folder).model
    assert isinstance(model, RandomOrderModel) and model.label_dropout == 0.1
    assert (model.codec.values, model.codec.length) == ((7, 16) if codec == "codebook" else (256, 64))


def picture(path: Path) -> Any:
    return np.asarray(Image.open(path))


def test_the_commands_need_no_flag(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    run = run_experiment(short(32), tmp_path / "pixels")
    main(["sample", str(run), "--n", "3", "--set", "guidance=3", "--out", str(tmp_path / "s"), "--trajectory"])
    assert "(6 network calls each)" in " ".join(capsys.readouterr().out.split())
    main(["sample", str(run), "--n", "2", "--set", "expansion=2", "--out", str(tmp_path / "l"), "--npz"])
    assert picture(tmp_path / "l/000001.png").shape == (16, 16)
    main(["evaluate", str(run), "--metrics", "bpd", "--n", "20", "--passes", "2"])
    (entry,) = json.loads((run / "metrics.json").read_text())["likelihoods"]
    assert entry["report"]["kind"] == "bound" and 5 < entry["report"]["bpd"] < 9
    assert any("draws an order" in note for note in entry["report"]["notes"])
    real = open_images("digits", split="test").images([3])[0, :, :, 0]
    words = ["edit", str(run), "--index", "3", "--n", "2", "--out", str(tmp_path / "e"), "--task"]
    main([*words, "inpaint", "--mask", "top", "--steps", "5"])
    first, second = (picture(tmp_path / f"e/inpaint-{i}.png") for i in range(2))
    assert (first[4:] == real[4:]).all() and (second[4:] == real[4:]).all() and (first != second).any()
    main([*words, "outpaint", "--mask", "left"])
    assert (picture(tmp_path / "e/outpaint-0.png")[:, 4:] == real).all()
    main(["report", str(run)])
    assert "bits/dim" in (run / "report.html").read_text()
    assert "expected [8, 8, 1]" in refused("evaluate", run, "--n", 20, "--set", "expansion=2")
    codes = run_experiment(short(16).giving(tokenizer=str(tokenizer)), tmp_path / "codes")
    main(["sample", str(codes), "--n", "2", "--set", "expansion=2", "--out", str(tmp_path / "c")])
    assert picture(tmp_path / "c/000000.png").shape == (16, 16)
    assert "do not hold all of an image" in refused("evaluate", codes, "--metrics", "bpd")
