"""The generator: image i of a seed is the same picture whatever the batch around it; samplers as JSON."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from imagewright.models.consistency import ConsistencyModel
from imagewright.models.files import ModelFile
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.oracles import GaussianMixture
from imagewright.pretrained import find_model
from imagewright.samplers import SAMPLERS, Ablation, Euler, Heun, MultistepConsistency
from imagewright.samplers.generator import ImageGenerator, ahead, generator_from, sampler_from_json, sampler_to_json
from imagewright.types import UNCONDITIONAL, DataSpec, UserError

SPEC = DataSpec(name="test", resolution=8, channels=3, num_classes=4)
CENTRES = torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=torch.float64)


class Exact(nn.Module):
    """The denoiser of four classes, each a grey of its own with a little noise; counts the rows of every call."""

    sigma_min, sigma_max = 0.0, math.inf

    def __init__(self):
        super().__init__()
        means = CENTRES[:, None, None, None].expand(4, *SPEC.shape)
        self.oracle = GaussianMixture(means, 0.02, classes=torch.arange(4))
        self.rows = []

    def round_sigma(self, sigma):
        return sigma

    def forward(self, x, sigma, cond=UNCONDITIONAL):
        self.rows.append(len(x))
        return self.oracle(x, sigma, cond)


def network() -> SongUNet:
    torch.manual_seed(0)
    config = SongUNetConfig(
        img_resolution=8, in_channels=3, out_channels=3, label_dim=4,
        model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,),
    )  # fmt: skip
    made = SongUNet(config)
    for p in made.parameters():  # the last layers start at zero, which would hide the network
        nn.init.normal_(p, std=0.1)
    return made


def generator(sampler=None) -> ImageGenerator:
    return ImageGenerator(Exact(), SPEC, sampler or Heun(num_steps=4))


# --- which image is which -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"S_churn": 2.0}], ids=["deterministic", "churn"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_changes_nothing(settings, batch_size):
    made = generator(Heun(num_steps=4, **settings))
    whole = made.generate(8, batch_size=8)
    assert whole.shape == (8, 8, 8, 3)
    assert whole.dtype == np.uint8
    assert len({image.tobytes() for image in whole}) == 8
    made.model.rows.clear()
    assert np.array_equal(made.generate(8, batch_size=batch_size), whole)
    assert max(made.model.rows) == batch_size


@pytest.mark.parametrize(
    ("model", "sampler"),
    [
        (EDMPrecond, Heun(num_steps=3, S_churn=1.0)),
        (ConsistencyModel, MultistepConsistency(sigmas=(1.0,))),
    ],
)
def test_batch_size_changes_nothing_through_a_network(model, sampler):
    made = ImageGenerator(model(network()), SPEC, sampler)
    whole = made.generate(5, batch_size=5).astype(int)
    # Float32 sums of another batch size may round a value at the border of two levels the other way.
    assert np.abs(made.generate(5, batch_size=2).astype(int) - whole).max() <= 1


def test_offsets_and_single_images_agree():
    made = generator(Heun(num_steps=4, S_churn=2.0))
    whole = made.generate(7)
    assert np.array_equal(made.generate(4, first=3), whole[3:])
    drawn = made.labels(7, seed=0)
    assert np.array_equal(made.at([5, 2], labels=drawn[[5, 2]]), whole[[5, 2]])
    assert np.array_equal(np.concatenate(list(made.batches(7, batch_size=3))), whole)


def test_seeds_differ():
    made = generator()
    assert not np.array_equal(made.generate(2, labels=0, seed=1), made.generate(2, labels=0, seed=2))


# --- labels ---------------------------------------------------------------------------------------------------


def grey(label):
    return 127.5 * (float(CENTRES[label]) + 1)


def test_labels_are_obeyed():
    made = generator(Heun(num_steps=8))
    assert made.generate(4, labels=[3, 0, 2, 1]).mean((1, 2, 3)) == pytest.approx(
        [grey(i) for i in (3, 0, 2, 1)], abs=4
    )
    assert made.generate(2, labels=1).mean((1, 2, 3)) == pytest.approx([grey(1)] * 2, abs=4)


def test_labels_that_are_not_asked_for_are_drawn_per_image():
    made = generator(Heun(num_steps=8))
    labels = made.labels(200, seed=3)
    assert labels.dtype == np.int64
    counts = np.bincount(labels, minlength=4)
    assert len(counts) == 4
    assert counts.min() > 25  # of 50 expected, 4 standard deviations
    assert np.array_equal(made.labels(50, seed=3, first=20), labels[20:70])
    assert not np.array_equal(made.labels(200, seed=4), labels)
    assert made.generate(5, seed=3).mean((1, 2, 3)) == pytest.approx([grey(i) for i in labels[:5]], abs=4)


def test_a_model_without_classes_is_told_nothing():
    spec = DataSpec(name="test", resolution=8, channels=3)
    made = ImageGenerator(Exact(), spec, Heun(num_steps=4))
    assert made.labels(3, seed=0) is None
    assert np.array_equal(made.generate(2), made.generate(2, labels=-1))
    with pytest.raises(UserError, match=r"label 0 is not known to this model; allowed: -1 \(it has no classes\)"):
        made.generate(1, labels=0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"labels": 4}, "label 4 is not known to this model; allowed: 0 to 3, or -1"),
        ({"labels": [0, -2]}, "label -2 is not known"),
        ({"labels": [0, 1, 2]}, "3 labels were given for 2 images"),
        ({"n": 0}, "n is 0"),
        ({"n": 2.0}, "n is 2.0; it must be a whole number >= 1"),
        ({"n": True}, "n is True; it must be a whole number"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": -3}, "batch_size is -3; it must be a whole number >= 1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"first": -1}, "first is -1"),
        ({"labels": 1.5}, "labels must be whole numbers, got"),
        ({"labels": [0.9, 1.9]}, "labels must be whole numbers, got"),
        ({"labels": "7"}, "labels must be whole numbers, got"),
        ({"labels": ["1", "2"]}, "labels must be whole numbers, got"),
        ({"labels": True}, "labels must be whole numbers, got"),
        ({"labels": [True, False]}, "labels must be whole numbers, got"),
        ({"labels": [float("nan"), 1]}, "labels must be whole numbers, got"),
        ({"labels": [None, 1]}, "labels must be whole numbers, got"),
        ({"labels": [[0, 1]]}, "2 labels were given for 2 images"),
        ({"labels": np.array([0, 2**64 - 1], dtype=np.uint64)}, "whole numbers go up to"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        generator().generate(**({"n": 2} | options))


# --- samplers -------------------------------------------------------------------------------------------------


def test_kinds_of_model_have_their_samplers():
    assert isinstance(ImageGenerator(EDMPrecond(network()), SPEC).sampler, Heun)
    assert isinstance(ImageGenerator(ConsistencyModel(network()), SPEC).sampler, MultistepConsistency)
    with pytest.raises(UserError, match="sampler Euler draws from a denoiser; this model is a flow map"):
        ImageGenerator(ConsistencyModel(network()), SPEC, Euler())
    with pytest.raises(UserError, match="MultistepConsistency draws from a flow map; this model is a denoiser"):
        ImageGenerator(EDMPrecond(network()), SPEC, MultistepConsistency())


def test_the_saved_sampler_is_the_default():
    file = ModelFile(model=Exact(), spec=SPEC, sampler=sampler_to_json(Heun(num_steps=7)))
    assert generator_from(file).sampler == Heun(num_steps=7)
    assert generator_from(file, Euler(num_steps=2)).sampler == Euler(num_steps=2)


@pytest.mark.parametrize(
    "sampler",
    [
        *(made() for made in SAMPLERS.values()),
        Heun(num_steps=256, S_churn=40, S_min=0.05, S_max=50, S_noise=1.003),
        Ablation(grid="vp", schedule="ve", scaling="vp", sigma_max=70.0, alpha=0.5),
        MultistepConsistency(sigmas=(1.382, 0.5), clip=False),
    ],
    ids=repr,
)
def test_samplers_survive_json(sampler):
    text = json.dumps(sampler_to_json(sampler), allow_nan=False)
    back = sampler_from_json(json.loads(text))
    assert back == sampler
    assert type(back) is type(sampler)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            {"class": "dpm"},
            r"sampler 'dpm'; this version has ablation, accelerated, .*, dpm-solver\+\+",
        ),
        ({"num_steps": 3}, "sampler None; this version has"),
        ({"class": ["heun"]}, "this version has"),
        ({"class": "heun", "order": 3}, "sampler 'heun': .*order"),
        ({"class": "heun", "S_churn": "much"}, "sampler 'heun': "),
        ({"class": "heun", "num_steps": 0}, "num_steps is 0"),
        ({"class": "multistep-consistency", "sigmas": 0.8}, "sampler 'multistep-consistency': "),
    ],
)
def test_unknown_samplers_and_settings_are_refused(value, sentence):
    with pytest.raises(UserError, match=sentence):
        sampler_from_json(value)


def test_precision_is_that_of_the_network_s_calls_and_named_when_it_is_none() -> None:
    """bf16 images are near the float32 ones, and others."""
    file = find_model("emoji64-32")
    exact, rounded = (
        ImageGenerator(file.model, file.spec, Heun(num_steps=3), precision=precision).drawn([0, 1], labels=[1, 2])
        for precision in ("fp32", "bf16")
    )
    assert 0 < float((exact - rounded).abs().mean() / exact.std()) < 0.1
    with pytest.raises(UserError, match="precision is 'fp8'; allowed: fp32, bf16, fp16"):
        ImageGenerator(file.model, file.spec, precision="fp8")  # type: ignore[arg-type]


def test_a_thread_works_ahead_in_order() -> None:
    """By one: what is asked for is what came before; an error is told where its item would have been."""
    done: list[int] = []

    def halved(number: int) -> float:
        done.append(number)
        return 6 / number

    found = ahead(halved, iter((3, 2, 1, 0)))
    assert next(found) == 2 and 3 in done and 1 not in done
    assert [next(found), next(found)] == [3, 6]
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert list(ahead(halved, ())) == []
