"""Classification: a step by hand, crops, the published schedule, resume; the commands on what it makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imagewright.cli.dry_run import StandIns
from imagewright.cli.main import main
from imagewright.data import ImageSet, open_images
from imagewright.methods.classification import Classification, shifted
from imagewright.metrics.accuracy import measure_accuracy
from imagewright.metrics.extractors import find_extractor
from imagewright.models.classifier import Classifier
from imagewright.models.files import ModelFile, load_model, save_model
from imagewright.networks import WideResNet, WideResNetConfig
from imagewright.noise import BatchNoise, StepNoise
from imagewright.pretrained import find_model
from imagewright.recipes import RECIPES
from imagewright.training.config import OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment, assemble
from imagewright.training.given import Sources
from imagewright.training.learners import Learner
from imagewright.types import Batch, Clock, Condition, DataSpec, Encoding, Trained, Update, UserError, View

TINY = WideResNetConfig(img_resolution=8, in_channels=1, num_classes=10, blocks=1, widen=1)
SPEC = DataSpec(name="digits", resolution=8, channels=1, num_classes=10)
BASE = RECIPES["wrn-digits"]()


def tiny(total: int = 96) -> Experiment:
    each = {"log_images": 16, "snapshot_images": total, "checkpoint_images": total // 3}
    training = replace(BASE.training, total_images=total, batch=16, micro_batch=8, **each)
    return replace(BASE, network=TINY, training=training)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier") / "named"
    save_model(folder, ModelFile(model=Classifier(WideResNet(TINY)), spec=SPEC))
    return folder


def test_a_step_is_the_cross_entropy_of_the_class() -> None:
    torch.manual_seed(0)
    method = Classification(shift=0, mean=(0.25,))
    parts = method.parts(network=WideResNet(TINY), spec=SPEC)
    images, label = torch.rand(4, 1, 8, 8) * 2 - 1, torch.tensor([3, 0, -1, 9])
    noise = StepNoise(0, 0)
    (event,) = method.step(parts, Batch(images, Condition(label=label)), noise, Clock(0, 0, 4))
    assert isinstance(event, Update)
    logits = parts.classifier.network((images + 1) / 2 - 0.25).logits
    by_hand = torch.stack([-F.log_softmax(row, 0)[k] for row, k in zip(logits, label, strict=True) if k >= 0])
    torch.testing.assert_close(event.loss[[0, 1, 3]], by_hand)
    assert event.loss[2] == 0


def test_pictures_are_crops_of_the_padded_one() -> None:
    images = torch.rand(6, 2, 5, 5) + 1
    noise = BatchNoise(1, 0, range(6), 6)
    moved, padded = shifted(images, 2, noise), F.pad(images, (2, 2, 2, 2))
    places = set()
    for one, whole in zip(moved, padded, strict=True):
        at = [(r, c) for r in range(5) for c in range(5) if torch.equal(whole[:, r : r + 5, c : c + 5], one)]
        assert len(at) == 1
        places |= set(at)
    assert len(places) > 3
    assert torch.equal(moved[2:4], shifted(images[2:4], 2, BatchNoise(1, 0, range(2, 4), 6)))


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_optimiser_is_sgd_with_momentum(nesterov: bool) -> None:
    layer = nn.Linear(3, 1, bias=False)
    weight, velocity = layer.weight.detach().clone(), torch.zeros(1, 3)
    o = OptimizerConfig(kind="sgd", lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    learner = Learner(Trained(module=layer, ema=False), TrainingConfig(total_images=9, batch=1, optimizer=o),
                      torch.device("cpu"))  # fmt: skip
    for step, gradient in enumerate(torch.randn(4, 1, 3)):
        if step == 2:
            learner.restart()
            velocity.zero_()
        layer.weight.grad = gradient.clone()
        learner.step(step + 1)
        slope = gradient + 0.01 * weight
        velocity = 0.9 * velocity + slope
        weight = weight - 0.1 * (slope + 0.9 * velocity if nesterov else velocity)
        torch.testing.assert_close(layer.weight.detach(), weight)


@pytest.mark.parametrize("halted", [0.0, 1.0])
def test_a_first_step_that_is_left_out_leaves_no_momentum(halted: float) -> None:
    layer = nn.Linear(3, 1, bias=False)
    before = layer.weight.detach().clone()
    o = OptimizerConfig(kind="sgd", lr=0.1)
    learner = Learner(Trained(module=layer, ema=False), TrainingConfig(total_images=9, batch=1, optimizer=o),
                      torch.device("cpu"))  # fmt: skip
    layer.weight.grad = torch.ones(1, 3)
    learner.step(1, halted=torch.tensor(halted))
    momentum = learner.state()["optimizer"]["weight"]["momentum_buffer"]
    assert torch.equal(momentum, torch.full((1, 3), 1 - halted))
    torch.testing.assert_close(layer.weight.detach(), before - 0.1 * (1 - halted))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("wrn28-2-imagenet32", 1.6), ("wrn28-5-imagenet32", 9.5), ("wrn28-10-imagenet32", 37.1)],
)
def test_published_recipes(name: str, millions: float) -> None:
    run = RECIPES[name]()
    with torch.device("meta"):
        model = assemble(run, sources=StandIns()).parts.roles["classifier"].module
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert run.data.xflip and run.method.shift == 4
    training = run.training.in_images()
    total, o = training.total_images, training.optimizer
    assert total == 40 * 2 * 1_281_167 and training.batch == 128
    assert (o.kind, o.momentum, o.nesterov, o.weight_decay) == ("sgd", 0.9, False, 2 * 5e-4)
    epoch = 2 * 1_281_167
    for number, rate in ((0, 0.01), (9, 0.01), (10, 0.002), (20, 0.0004), (30, 0.00008), (39, 0.00008)):
        assert o.lr_at(number * epoch + 128, total) == pytest.approx(rate)


def test_resuming_changes_no_bit(resumed_run: Callable[[Experiment], Path]) -> None:
    folder = resumed_run(tiny())
    file = find_model(folder)
    assert isinstance(file.model, Classifier) and file.sampler is None and file.origin["weights"] == "raw"
    assert not list(folder.glob("samples/*"))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert any("accuracy" in key for line in log for key in line)


def test_a_model_file_keeps_answers(saved: Path) -> None:
    file, images = load_model(saved), torch.rand(3, 1, 8, 8) * 2 - 1
    model: Any = file.model
    again: Any = load_model(saved).model
    made = model.encode(images)
    assert torch.equal(made.logits, again.encode(images).logits) and model.view == again.view
    assert model.view == View(side=8, channels=1, resize="box", mean=(0.5,), std=(1.0,))
    assert made.pooled.shape == (3, 32) and made.logits.shape == (3, 10)
    torch.testing.assert_close(made.pooled, model.network((images + 1) / 2 - 0.5).pooled)
    assert made.grid == (4, 4) and torch.equal(made.tokens.mean(1), made.pooled)
    torch.testing.assert_close(model.encode(images.repeat_interleave(3, 2).repeat_interleave(3, 3)).pooled, made.pooled)
    with pytest.raises(UserError, match=r"takes square images, got 8 x 4"):
        model.encode(images[:, :, :, :4])
    with pytest.raises(UserError, match=r"takes images of 1 channel\(s\), got 3"):
        model.encode(images.expand(-1, 3, -1, -1))


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="needs a ConvClassifier or VCMamba or WideResNet as its network, not a Linear"):
        Classifier(nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"mean is \(0.5, 2\); it must be one number in \[0, 1\]"):
        Classifier(WideResNet(TINY), (0.5, 2))
    with pytest.raises(UserError, match="digits has 0 classes; a classifier needs at least 2"):
        Classification().parts(network=WideResNet(TINY), spec=replace(SPEC, num_classes=0))
    with pytest.raises(UserError, match=r"method\.shift is -1"):
        Classification(shift=-1)


class Fixed(nn.Module):
    """Logits that know the first two pixels: the class by a half, another class for sure."""

    def __init__(self, knows: bool = True) -> None:
        super().__init__()
        self.knows = knows

    def encode(self, images: torch.Tensor) -> Encoding:
        guess = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
        logits = F.one_hot(guess, 10).float() - torch.arange(10) / 100
        return Encoding(images.flatten(1), logits=logits if self.knows else None)


def test_accuracy_is_that_of_hand() -> None:
    pixels = np.zeros((4, 8, 8, 1), np.uint8)
    pixels[:, 0, 0, 0] = (1, 2, 3, 4)
    names = tuple(map(str, range(10)))
    images = ImageSet.of(pixels, labels=np.array([1, 2, 0, 9]), name="toy", class_names=names)
    found = measure_accuracy(Fixed(), images, batch_size=3)
    # After its guess come 0, 1, 2, 3 (but the guess): the third's class is among five, the fourth's is not.
    assert (found.top1, found.top5, found.num_images, found.classes) == (0.5, 0.75, 4, 10)
    assert found.stderr == pytest.approx(0.25)
    with pytest.raises(UserError, match="names no classes"):
        measure_accuracy(Fixed(knows=False), images)


def test_evaluate_says_how_often_it_is_right(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(saved), "--data", "digits", "--n", "20", "--device", "cpu"])
    main(["evaluate", str(saved), "--data", "digits", "--n", "20", "--device", "cpu"])
    told = capsys.readouterr().out
    assert "top-1" in told and "20 images, split test, 10 classes" in told
    (entry,) = json.loads((saved / "metrics.json").read_text())["accuracies"]
    images = open_images("digits", split="test")
    expected = measure_accuracy(load_model(saved).model, images.subset([i * len(images) // 20 for i in range(20)]))
    assert entry["report"]["top1"] == expected.top1 and entry["report"]["top5"] == expected.top5
    for words in (["--metrics", "fd"], ["--steps", "3"]):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", str(saved), "--data", "digits", *words])
        assert ended.value.code == 2
        assert "has no effect on" in capsys.readouterr().err


def test_it_draws_and_edits_nothing(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("sample", "couple"):
        with pytest.raises(SystemExit):
            main([command, str(saved), "--out", str(tmp_path / "out"), "--n", "1"])
        assert "a Classifier draws no images; it turns images into features" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(
            ["edit", str(saved), "--task", "inpaint", "--index", "3", "--mask", "left", "--out", str(tmp_path / "out")]
        )
    assert ended.value.code == 2
    assert "draws nothing; it turns images into features" in capsys.readouterr().err


def test_what_learns_by_a_perceptual_distance_takes_a_classifiers_run(saved: Path, tmp_path: Path) -> None:
    run = RECIPES["ict-digits"]()
    method = replace(run.method, distance=replace(run.method.distance, kind="perceptual"))
    run = replace(run, method=method).giving(features=str(saved))
    sources = Sources()
    parts = assemble(run, sources=sources).parts
    assert sources.inputs["features"] == {"weights_sha256": load_model(saved).weights_sha256}
    maps = parts.roles["features"].module(torch.zeros(2, 1, 8, 8))
    assert [m.shape for m in maps] == [(2, 32, 4, 4)]


def test_its_run_is_an_extractor(saved: Path) -> None:
    extractor = find_extractor(str(saved), "digits")
    images = open_images("digits").images(range(5))
    features, logits = extractor(images)
    assert (extractor.name, extractor.dim, extractor.num_classes) == ("named", 32, 10)
    model: Any = load_model(saved).model
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        np.testing.assert_allclose(features, model.encode(x).pooled, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(logits, model.encode(x).logits, rtol=1e-5, atol=1e-6)
