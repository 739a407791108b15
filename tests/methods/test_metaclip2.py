"""Meta CLIP 2's loss, networks and training: closed forms, causality, resumption, zero-shot accuracy."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from imagewright.cli.main import main
from imagewright.data.captions import Captioned
from imagewright.methods.metaclip2 import MOST, MetaCLIP2, contrast
from imagewright.models.files import load_model
from imagewright.models.image_text import ImageText
from imagewright.networks import CLIP, CLIPConfig
from imagewright.noise import StepNoise
from imagewright.recipes import RECIPES
from imagewright.training.experiment import Experiment, assemble, run_experiment
from imagewright.training.learners import Learner
from imagewright.types import Clock, Trained, Update, UserError

TINY = CLIPConfig(img_resolution=8, in_channels=1, patch=4, width=8, depth=1, head_width=8, embed=6, vocabulary=64,
                  length=8, text_width=8, text_depth=1, text_heads=2)  # fmt: skip


def tiny() -> Experiment:
    run = RECIPES["metaclip2-digits"]()
    training = replace(run.training, total_images=32, batch=8, log_images=8, snapshot_images=32, checkpoint_images=16)
    return replace(run, data=replace(run.data, pairs=200, length=8), network=TINY, training=training)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_loss_of_orthonormal_features(scale: float) -> None:
    """log(1 + (B - 1) exp(-s)) for each pair."""
    x = torch.eye(7, 9, dtype=torch.float64)
    loss = contrast(x, x, x, x, torch.tensor(scale, dtype=torch.float64), slice(0, 7))["loss"]
    assert loss.tolist() == pytest.approx([math.log(1 + 6 * math.exp(-scale))] * 7, rel=1e-12)


def test_slopes_are_those_of_finite_differences_and_both_directions_count() -> None:
    pictures, texts = unit(4, 3), unit(8, 3)[4:]
    scale = torch.tensor(2.0, dtype=torch.float64)

    def loss(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
        return contrast(a, b, a, b, s, slice(0, 4))["loss"]

    args = tuple(each.clone().requires_grad_() for each in (pictures, texts, scale))
    assert torch.autograd.gradcheck(loss, args, atol=1e-9)
    logits = 2 * pictures @ texts.mT
    one, other = (F.cross_entropy(each, torch.arange(4), reduction="none") for each in (logits, logits.mT))
    torch.testing.assert_close(loss(*args), (one + other) / 2)
    assert not torch.allclose(one, other)


def test_shares_of_a_batch_are_the_whole_batch() -> None:
    """Each of two processes has the losses of its own rows; with gathered features they are one process's."""
    pictures, texts, scale = unit(6, 3), unit(12, 3)[6:], torch.tensor(3.0, dtype=torch.float64)
    whole = contrast(pictures, texts, pictures, texts, scale, slice(0, 6))["loss"]
    parts = [contrast(pictures[r], texts[r], pictures, texts, scale, r)["loss"] for r in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-14, atol=0)


def test_a_picture_is_right_where_its_own_caption_is_its_nearest() -> None:
    """Not where it is the nearest picture of its caption, which here are the others."""
    pictures, texts = (torch.tensor(x) for x in ([[0.8, 0.6], [0.6, 0.8]], [[0.6, 0.8], [0.0, 1.0]]))
    assert contrast(pictures, texts, pictures, texts, torch.tensor(1.0), slice(0, 2))["accuracy"].tolist() == [1, 0]


# --- networks ---------------------------------------------------------------------------------------------------------


def test_what_stands_after_the_end_of_a_text_changes_nothing() -> None:
    network = CLIP(TINY).double()
    tokens = torch.tensor([[5, 9, 2, 1, 1, 1], [7, 2, 1, 1, 1, 1]])
    changed = torch.tensor([[5, 9, 2, 33, 2, 7], [7, 2, 44, 3, 3, 9]])
    torch.testing.assert_close(network.text(tokens), network.text(changed), rtol=0, atol=1e-15)
    torch.testing.assert_close(network.text(tokens), network.text(tokens[:, :4]), rtol=0, atol=1e-12)
    before = torch.tensor([[5, 8, 2, 1, 1, 1], [8, 2, 1, 1, 1, 1]])
    assert (network.text(tokens) - network.text(before)).abs().amin(1).min() > 0
    with pytest.raises(UserError, match="takes at most 8"):
        network.text(torch.full((1, 9), 2))


def test_initial_numbers_are_the_published_ones() -> None:
    network = CLIP(replace(TINY, width=64, text_width=64, text_heads=1, text_depth=2, vocabulary=500))
    block, text = network.blocks[0], network.text_blocks[0]
    for layer, std in (
        (text.qkv, 64**-0.5), (text.up, 128**-0.5), (text.down, 256**-0.5), (text.out, 256**-0.5),
        (block.qkv, (2 / 256) ** 0.5),
    ):  # fmt: skip
        assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.05)
    assert block.qkv.weight.abs().max().item() <= (6 / 256) ** 0.5
    assert network.tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    few = {"places": 1 / 8, "project": 1 / 8, "first": 1 / 8, "text_project": 1 / 8, "text_places": 0.01}
    for name, std in few.items():  # of some hundred numbers each, of 64 the class token
        near = 0.5 if name == "first" else 0.25
        assert network.get_parameter(name).detach().std().item() == pytest.approx(std, rel=near), name
    assert network.log_scale.exp().item() == pytest.approx(1 / 0.07)
    assert not block.qkv.bias.any() and not text.out.bias.any() and block.up.bias.any()


def test_tokens_of_a_picture_are_its_patches() -> None:
    """Of blocks that add nothing: what goes in, without the class token."""
    network, x = CLIP(TINY).requires_grad_(False), torch.randn(2, 1, 8, 8)
    for layer in (network.blocks[0].out, network.blocks[0].down):
        layer.weight.zero_(), layer.bias.zero_()
    patches = network.before(network.patches(x).flatten(2).mT + network.places[1:])
    torch.testing.assert_close(network.image(x).tokens, patches)


@pytest.mark.parametrize(
    "wrong", [{"patch": 3}, {"head_width": 5}, {"text_heads": 3}, {"activation": "relu"}, {"length": 1}]
)
def test_networks_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError):
        replace(TINY, **wrong)  # type: ignore[arg-type]


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_step_keeps_the_scale_within_its_range() -> None:
    made = assemble(tiny())
    model = made.parts.clip
    batch = Captioned(torch.zeros(4, 1, 8, 8), torch.full((4, 8), 2))
    for start, end in ((9.0, MOST), (-3.0, 0.0), (1.0, 1.0)):
        model.network.log_scale.data.fill_(start)
        events = list(tiny().method.step(made.parts, batch, StepNoise(0), Clock(0, 0, 8)))
        assert [type(event) for event in events] == [Update]
        assert model.network.log_scale.item() == pytest.approx(end)
    assert events[0].loss.tolist() == pytest.approx([math.log(4)] * 4), "four pairs alike"


def test_a_step_compares_directions() -> None:
    """Embeddings are of unit length, and cosines times the scale; all of it learns, what is gathered and the scale."""
    made = assemble(tiny())
    model = made.parts.clip
    x, tokens = torch.rand(4, 1, 8, 8) * 2 - 1, torch.tensor([[k, k + 1, 2] for k in range(5, 9)])
    [update] = tiny().method.step(made.parts, Captioned(x, tokens), StepNoise(0), Clock(0, 0, 8))
    a, b = (F.normalize(each, dim=1) for each in (model.network.image(x).pooled, model.network.text(tokens)))
    wanted = contrast(a, b, a, b, model.network.log_scale.exp(), slice(0, 4))["loss"]
    torch.testing.assert_close(update.loss, wanted, rtol=1e-4, atol=1e-5)
    learn = [model.network.log_scale, model.network.project, model.network.text_project]
    found, told = (torch.autograd.grad(loss.sum(), learn) for loss in (update.loss, wanted))
    torch.testing.assert_close(found, told, rtol=1e-3, atol=1e-5)
    assert all(slope.abs().max() > 1e-3 for slope in told)


def test_of_each_picture_so_much_is_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slopes of what is seen of two ramps are a part's sides."""
    made = assemble(tiny())
    network, seen = made.parts.clip.network, []
    monkeypatch.setattr(network, "image", lambda x: seen.append(x) or CLIP.image(network, x))
    ramp = torch.linspace(-0.5, 0.5, 8).expand(99, 1, 8, 8)
    for x in (ramp, ramp.mT):
        list(MetaCLIP2(area=0.9).step(made.parts, Captioned(x, torch.full((99, 3), 2)), StepNoise(0), Clock(0, 0, 8)))
    wide, high = ((x[:, 0, 4, 4] - y) * 7 for x, y in ((seen[0], seen[0][:, 0, 4, 3]), (seen[1], seen[1][:, 0, 3, 4])))
    assert (
        (wide * high).min() > 0.9 - 1e-5 and (wide * high).max() < 1 + 1e-5 and 0.9 < wide.min() < high.max() <= 1.001
    )
    assert (wide * high).std() > 0.01 and seen[0][:, 0, 4, 4].std() > 0.005, "of other sizes, and from other places"


def test_decay_falls_on_matrices_alone() -> None:
    """Without a slope there is nothing but the decay."""
    run = tiny()
    network = CLIP(TINY)
    config = replace(run.training, optimizer=replace(run.training.optimizer, lr_ramp_images=0, lr_cooldown_images=0))
    learner = Learner(Trained(module=network, ema=False), config.in_images(), torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    learner.step(8)
    for name, p in network.named_parameters():
        factor = 1 - 1e-3 * 0.1 if p.ndim >= 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-6, atol=1e-9)
    assert {name for name, p in network.named_parameters() if p.ndim < 2} >= {"log_scale", "first", "after.weight"}
    with pytest.raises(UserError, match="decay_vectors has no effect"):
        replace(config.optimizer, weight_decay=0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(tiny(), tmp_path_factory.mktemp("runs") / "run")


def test_a_killed_run_ends_with_the_same_bits(run: Path, tmp_path: Path) -> None:
    folder = run_experiment(tiny(), tmp_path / "run")
    for path in (*(folder / "checkpoints").glob("*32.safetensors"), folder / "model.safetensors"):
        path.unlink()
    assert list((folder / "checkpoints").glob("*16.safetensors"))
    run_experiment(tiny(), folder, resume=True)
    assert (folder / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_it_names_classes_in_every_language_and_judges_samples(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(run), "--device", "cpu"])
    entries = json.loads((run / "metrics.json").read_text())["accuracies"]
    assert [entry["language"] for entry in entries] == ["en", "de", "ja"]
    assert {entry["report"]["classes"] for entry in entries} == {10} and "language" in capsys.readouterr().out
    model = load_model(run).model
    assert isinstance(model, ImageText)
    images = torch.rand(5, 1, 8, 8) * 2 - 1
    english = model.encode(images)
    assert english.logits is not None and english.logits.shape == (5, 10)
    assert english.tokens is not None and english.tokens.shape == (5, 4, 8) and english.grid == (2, 2)
    model.speak("ja")
    assert not torch.allclose(model.encode(images).logits, english.logits)
    told = model.prompts["en"]
    texts = F.normalize(model.texts([t.replace("{}", told["classes"][3]) for t in told["templates"]]), dim=1)
    wanted = F.normalize(texts.mean(0), dim=0)
    torch.testing.assert_close(model.classes("en")[3], wanted)
    with pytest.raises(UserError, match="no prompts are in 'fr'; there are en, de, ja"):
        model.speak("fr")


def test_a_run_without_names_of_classes_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(run).model
    with pytest.raises(UserError, match="as many"):
        ImageText(model.network, "bytes", [["en", ["a {}"], ["x"]], ["de", ["ein {}"], ["x", "y"]]])
    with pytest.raises(UserError, match="where the class is named"):
        ImageText(model.network, "bytes", [["en", ["a"], ["x"]]])
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--split", "all", "--device", "cpu"])
    assert "--split goes with --data" in capsys.readouterr().err


def test_a_method_of_captions_refuses_labelled_pictures_and_other_networks() -> None:
    with pytest.raises(UserError, match=r"learns from pictures with captions; digits .* holds labelled"):
        assemble(replace(tiny(), data=RECIPES["wrn-digits"]().data))
    with pytest.raises(UserError, match="this method trains a CLIP, not a WideResNet"):
        assemble(replace(tiny(), network=RECIPES["wrn-digits"]().network))
    with pytest.raises(UserError, match=r"method\.area"):
        MetaCLIP2(area=0)


def test_published_recipes_have_the_programs_settings() -> None:
    """configs/metaclip_v2.py: 196 pairs on each of 8 x 48 processes, 32 epochs of 920 M; as many steps as 12.8 B."""
    run = RECIPES["metaclip2-h14"]()
    o = run.training.optimizer
    assert (run.training.batch, run.training.precision, o.lr, o.betas, o.eps, o.weight_decay) == (
        75_264, "bf16", 4e-4, (0.9, 0.95), 1e-6, 0.1,
    )  # fmt: skip
    assert not o.decay_vectors and o.lr_ramp_images == 2000 * 75_264
    steps = run.training.total_images / run.training.batch
    assert steps == pytest.approx(12.8e9 / 32_768, rel=0.01) and np.isclose(32_768 / 0.44, 75_264, rtol=0.02)
    assert steps == 32 * int(920e6 / 75_264), "an epoch's last, smaller batch is none"
    assert run.data.t == 170_000 and run.data.length == 77
