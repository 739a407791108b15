"""VATT's training: the released objective, closed forms, masks, a step by hand, resumed runs, and its measures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.cli.main import main
from imagewright.data.clips import Clips
from imagewright.data.standin_triplets import StandinTripletsConfig
from imagewright.data.words import PAD, Bytes
from imagewright.methods.vatt import COLOURED, VATTTraining, coloured, kept, nce
from imagewright.metrics.retrieval import measure_retrieval
from imagewright.models.description import build, describe
from imagewright.models.vatt import VATTEncoder
from imagewright.networks.vatt import VATT, VATTConfig
from imagewright.noise import BatchNoise, StepNoise
from imagewright.pretrained import find_model
from imagewright.recipes import RECIPES
from imagewright.training.experiment import Experiment, assemble, run_experiment
from imagewright.types import Clock, Parts, Trained, UserError

LAYOUTS = ("asymmetric", "symmetric")
TAU = 0.07
RELEASED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "networks" / "vatt.json").read_text())
SIZE = (16, 1, 2)
NETWORK = VATTConfig(img_resolution=32, in_channels=1, patch=(4, 16), word_width=8, video=SIZE, audio=SIZE, text=SIZE,
                     joint=(16, 8), dropout=0.1)  # fmt: skip


def unit(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=-1)


def whole(video: Tensor, other: Tensor, layout: Any, valid: Tensor | None = None) -> Tensor:
    valid = torch.ones(len(video), dtype=torch.float64) if valid is None else valid
    return nce(video, other, valid, slice(None), TAU, layout)


# --- the objective --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["all", "masked"])
def test_the_released_objective(layout: str, which: str) -> None:
    def wave(*shape: int, step: float) -> Tensor:
        return F.normalize(torch.sin(torch.arange(math.prod(shape)).double() * step).view(shape), dim=-1)

    video, text, audio = wave(5, 4, step=0.7), wave(5, 3, 4, step=1.3), wave(5, 1, 4, step=2.1)
    valid = torch.ones(5).double() if which == "all" else torch.tensor([1.0, 0, 1, 1, 0]).double()
    for name, other in (("text", text), ("audio", audio)):
        found = float(whole(video, other, layout, valid).mean())
        assert found == pytest.approx(RELEASED["losses"][which][f"{layout}_{name}"], rel=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_matches_perfectly(layout: str) -> None:
    b, eye = 6, torch.eye(6, dtype=torch.float64)
    each = math.log(1 + (b - 1) * math.exp(-1 / TAU))
    wanted = math.log(2) + each if layout == "asymmetric" else 2 * each
    torch.testing.assert_close(
        whole(eye, eye[:, None], layout), torch.full((b,), wanted, dtype=torch.float64), rtol=0, atol=1e-13
    )


def test_one_caption_is_plain_nce() -> None:
    video, text = unit(5, 4), unit(5, 4, seed=1)
    logits = video @ text.T / TAU
    plain = F.cross_entropy(logits, torch.arange(5), reduction="none")
    other = F.cross_entropy(logits.T, torch.arange(5), reduction="none")
    torch.testing.assert_close(whole(video, text[:, None], "symmetric"), plain + other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sum_over_captions_is_within_the_logarithm(layout: str) -> None:
    video, text = unit(5, 4), unit(5, 3, 4, seed=1)
    loss = whole(video, text, layout)
    torch.testing.assert_close(whole(video, text[:, [2, 0, 1]], layout), loss)
    torch.testing.assert_close(whole(video, text.repeat(1, 2, 1), layout), loss)
    outside = torch.stack([whole(video, text[:, [k]], layout) for k in range(3)]).mean(0)
    averaged = whole(video, F.normalize(text.mean(1, keepdim=True), dim=-1), layout)
    assert not torch.allclose(loss, outside, rtol=1e-2) and not torch.allclose(loss, averaged, rtol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_masked_has_no_gradient_and_is_no_negative(layout: str) -> None:
    video, text = unit(5, 4).requires_grad_(), unit(5, 3, 4, seed=1).requires_grad_()
    valid = torch.tensor([1.0, 0, 1, 1, 0], dtype=torch.float64)
    loss = whole(video, text, layout, valid)
    (slope,) = torch.autograd.grad(loss.mean(), text)
    assert (slope[valid == 0] == 0).all() and (slope[valid == 1] != 0).all()
    assert (loss[valid == 0] == 0).all()
    # The mean over all is that over the valid; the masked clips' videos are still against the others' captions.
    across, down = (torch.einsum(f, video, text) / TAU for f in ("nd,mkd->nmk", "md,nkd->nmk"))
    wanted = []
    for i in (0, 2, 3):
        positive = across[i, i].logsumexp(0)
        a, d = across[i, [0, 2, 3]].flatten(), down[i].flatten()
        both = [torch.cat([a, d])] if layout == "asymmetric" else [a, d]
        wanted.append(sum(x.logsumexp(0) - positive for x in both))
    torch.testing.assert_close(loss.mean(), torch.stack(wanted).mean())  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_that_is_valid_gives_nothing(layout: str) -> None:
    video = unit(3, 4).requires_grad_()
    loss = whole(video, unit(3, 2, 4), layout, torch.zeros(3, dtype=torch.float64))
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert (loss == 0).all() and video.grad is not None and (video.grad == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_against_finite_differences(layout: str) -> None:
    valid = torch.tensor([1.0, 0, 1], dtype=torch.float64)
    video, text = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (3, 2, 2)))
    assert torch.autograd.gradcheck(lambda v, t: nce(v, t, valid, slice(0, 3), 1.0, layout), (video, text))  # type: ignore[arg-type]


def test_rows_are_those_of_the_whole() -> None:
    video, text, valid = unit(6, 4), unit(6, 3, 4, seed=1), torch.tensor([1.0, 0, 1, 1, 1, 1]).double()
    for layout in LAYOUTS:
        both = torch.cat([nce(video, text, valid, slice(i, i + 3), TAU, layout) for i in (0, 3)])  # type: ignore[arg-type]
        torch.testing.assert_close(both, whole(video, text, layout, valid))


# --- a step ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips() -> Clips:
    return StandinTripletsConfig().open().at(np.arange(6))


def parts(clips: Clips, **changes: Any) -> Parts:
    torch.manual_seed(0)
    made = StandinTripletsConfig().open()
    config = replace(NETWORK, words=made.vocabulary.values, length=8, frames=8, samples=2048, **changes)
    return Parts(encoder=Trained(module=VATTEncoder(VATT(config), json.dumps(made.vocabulary.describe()))))


def noise(step: int = 0) -> BatchNoise:
    return BatchNoise(0, step, range(6), 6)


def test_a_step_is_the_weighted_mean_of_both_losses(clips: Clips) -> None:
    found = parts(clips, dropout=0.0)
    method = VATTTraining(keep_tokens=1, audio_noise=0, text_weight=3, audio_weight=1)
    (event,) = method.step(found, clips, noise(), Clock(0, 0, 1))
    network: VATT = found.encoder.network
    text = network.text(clips.captions.flatten(0, 1))[:, 0]
    joint = network.joined(network.video(clips.video)[:, 0], network.audio(clips.audio)[:, 0], text)
    fine, audio, coarse, text = (F.normalize(each, dim=-1) for each in joint)
    one = nce(coarse, text.view(6, 5, -1), clips.told, slice(None), TAU, "asymmetric")
    two = nce(fine, audio[:, None], clips.heard, slice(None), TAU, "asymmetric")
    assert (clips.told == 0).any() and (one == 0).any()
    torch.testing.assert_close(event.loss, (3 * one + two) / 4)  # type: ignore[union-attr]


def test_one_drawn_caption_is_one_of_the_five(clips: Clips) -> None:
    method = VATTTraining(captions_used=1)
    drawn = torch.cat([method._captions(clips.captions, noise(k)) for k in range(40)], 1)
    assert drawn.shape == (6, 40, 8)
    for i in range(6):
        assert {*map(tuple, drawn[i].tolist())} == {*map(tuple, clips.captions[i].tolist())}


def test_tokens_that_are_kept() -> None:
    assert kept(9, 1, noise()) is None
    chosen = kept(9, 0.5, noise())
    assert chosen is not None and len(chosen) == 4 and len({*chosen.tolist()}) == 4
    other = kept(9, 0.5, BatchNoise(0, 0, range(3, 6), 6))
    assert other is not None and torch.equal(chosen, other)  # the same in every micro-batch and process
    assert not torch.equal(chosen, kept(9, 0.5, noise(1)))  # type: ignore[arg-type]
    assert len(kept(3, 0.1, noise())) == 1 and len(kept(7, 0.5, noise())) == 3  # type: ignore[arg-type]


def test_half_of_the_tokens_are_seen_in_training(clips: Clips) -> None:
    found = parts(clips)
    lengths: dict[str, int] = {}
    for name in ("video", "audio", "text"):
        backbone: nn.Module = found.encoder.network.backbones[name]
        backbone.register_forward_pre_hook(lambda _, given, name=name: lengths.update({name: given[0].shape[1]}))
    next(VATTTraining(keep_tokens=0.5).step(found, clips, noise(), Clock(0, 0, 1)))
    assert lengths == {"video": 1 + 4, "audio": 1 + 8, "text": 1 + 8}


def test_what_is_done_to_clips_is_done_to_all_frames(clips: Clips) -> None:
    still = clips.video[:, :, :1].expand(-1, 3, 8, -1, -1).clone()
    seen = VATTTraining(area=0.3, flip=True, colours=True)._seen(still, noise())
    assert seen.shape == still.shape and not torch.allclose(seen, still, atol=0.1)
    torch.testing.assert_close(seen, seen[:, :, :1].expand_as(seen))
    loud = VATTTraining(audio_noise=0.1)._listened(clips.audio, noise())
    assert 0.08 < float((loud - clips.audio).std() / clips.audio.abs().max()) < 0.12
    quiet = VATTTraining(audio_noise=0.1)._listened(clips.audio / 1000, noise())
    torch.testing.assert_close(1000 * quiet, loud)  # in units of the loudest moment


def test_half_of_the_clips_are_mirrored() -> None:
    video = torch.rand(400, 1, 2, 2, 3)
    seen = VATTTraining(flip=True)._seen(video, StepNoise(0))
    mirrored = (seen == video.flip(-1)).flatten(1).all(1)
    assert 160 < mirrored.sum() < 240 and torch.equal(seen[~mirrored], video[~mirrored])


def test_colours_change_in_four_of_five_clips() -> None:
    video = torch.rand(500, 3, 1, 2, 2) * 0.2
    changed = coloured(video, StepNoise(0))
    share = float((changed != video).flatten(1).any(1).float().mean())
    assert abs(share - COLOURED) < 0.06
    assert float(changed.abs().max()) <= 1
    grey = coloured(video[:, :1].expand(-1, 3, -1, -1, -1), StepNoise(0))
    torch.testing.assert_close(grey, grey[:, :1].expand_as(grey))  # no hue, and none is made


def test_colours_change_as_much_as_published() -> None:
    flat, drawn = torch.zeros(500, 3, 1, 2, 2), StepNoise(0)
    light = coloured(flat, drawn)
    assert 0.95 * 64 / 255 < float(light.abs().max()) <= 64 / 255 + 1e-6
    torch.testing.assert_close(light, light[:, :1, :, :1, :1].expand_as(light))
    made = coloured(flat + torch.tensor([-0.1, 0.1]), drawn)
    spread = (made[..., 1] - made[..., 0])[:, 0, 0, 0] / 0.2
    assert 0.6 - 1e-3 < float(spread.min()) < 0.63 and 1.37 < float(spread.max()) < 1.4 + 1e-3
    red = torch.tensor([0.2, 0.0, 0.0])
    made = coloured(flat + red.view(3, 1, 1, 1), drawn)[:, :, 0, 0, 0]
    tint, was = made - made.mean(1, keepdim=True), red - red.mean()
    richer, turned = (
        tint.norm(dim=1) / was.norm(),
        torch.rad2deg(F.cosine_similarity(tint, was, dim=1).clamp(-1, 1).acos()),
    )
    assert 0.6 - 1e-3 < float(richer.min()) < 0.63 and 1.37 < float(richer.max()) < 1.4 + 1e-3
    assert 69 < float(turned.max()) < 72.1  # a fifth of a turn


def test_contrast_is_that_of_each_frame() -> None:
    steps = torch.tensor([-0.3, 0.3]).view(1, 1, 2, 1, 1).expand(20, 1, 2, 2, 2)
    changed = coloured(steps, StepNoise(0))
    torch.testing.assert_close(changed[:, :, 1] - changed[:, :, 0], steps[:, :, 1] - steps[:, :, 0])


@pytest.mark.parametrize("step", [2_500, 5_000, 252_500, 500_000])
def test_the_published_rate(step: int) -> None:
    run = RECIPES["vatt-mbs-howto100m"]()
    training, method = run.training, run.method
    assert isinstance(method, VATTTraining) and method.area == 0.08 and method.flip and method.colours
    optimizer = training.optimizer
    assert (optimizer.kind, optimizer.betas, optimizer.eps) == ("adam", (0.9, 0.999), 1e-7)
    assert optimizer.clip_norm is None and optimizer.weight_decay == 0
    half = 5e-5 * (1 + math.cos(math.pi * (step - 5_000) / 495_000)) / 2 + 5e-5
    wanted = 1e-4 * step / 5_000 if step < 5_000 else half
    assert optimizer.lr_at(2048 * step, training.total_images) == pytest.approx(wanted, rel=1e-9)


def test_what_cannot_be_learnt_is_told(clips: Clips) -> None:
    with pytest.raises(UserError, match=r"nothing to compare it with; give training\.batch >= 2"):
        next(VATTTraining().step(parts(clips), clips[:1], BatchNoise(0, 0, range(1), 1), Clock(0, 0, 1)))
    for fault, change in {
        "both 0; nothing would be learnt": {"text_weight": 0.0, "audio_weight": 0.0},
        "keep_tokens is 0.0": {"keep_tokens": 0.0},
        "layout is 'both'; allowed: asymmetric, symmetric": {"layout": "both"},
        "captions_used is 2; it must be 0": {"captions_used": 2},
    }.items():
        with pytest.raises(UserError, match=fault):
            VATTTraining(**change)  # type: ignore[arg-type]
    run = RECIPES["vatt-standin-digits"]()
    with pytest.raises(
        UserError, match=r"learns from clips of video with sound and captions; digits .* holds labelled"
    ):
        assemble(replace(run, data=RECIPES["edm-digits"]().data))
    with pytest.raises(UserError, match=r"learns from labelled pictures; standin_triplets of .* holds clips of video"):
        assemble(replace(RECIPES["edm-digits"](), data=run.data))
    with pytest.raises(UserError, match="needs a VATT as its network, not a SongUNet"):
        assemble(replace(run, network=RECIPES["edm-digits"]().network))


# --- the model ------------------------------------------------------------------------------------------------


def test_a_picture_is_a_short_video(clips: Clips) -> None:
    model = parts(clips).encoder.eval()
    pictures = torch.rand(3, 1, 16, 16) * 2 - 1
    found = model.encode(pictures)
    assert found.pooled.shape == (3, 16) and found.tokens.shape == (3, 4, 16) and found.grid == (2, 2)
    large = pictures.repeat_interleave(2, 2).repeat_interleave(2, 3)
    video = model.network.video(large[:, :, None].expand(-1, -1, 4, -1, -1))
    torch.testing.assert_close(found.pooled, video[:, 0])


def test_clips_are_searched_by_the_models_own_words(clips: Clips) -> None:
    model, test = parts(clips).encoder, StandinTripletsConfig(split="test").open()
    own = measure_retrieval(model, test, n=12)
    other = measure_retrieval(model, replace(test, vocabulary=Bytes()), n=12, batch_size=5)
    assert own == other and own.clips < 12  # some have no text


def test_it_describes_itself_with_its_words(clips: Clips) -> None:
    model = parts(clips).encoder.eval()
    again: Any = build(json.loads(json.dumps(describe(model)))).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.of_texts(["this is a three"]), model.of_texts(["this is a three"]))
    assert not torch.allclose(model.of_texts(["this is a three"]), model.of_texts(["this is a four"]))
    with pytest.raises(UserError, match="the network has 47 words, and its vocabulary 48"):
        VATTEncoder(VATT(replace(model.network.config, words=47)), json.dumps(model.words.describe()))


# --- a run ----------------------------------------------------------------------------------------------------


def tiny(images: int = 24) -> Experiment:
    run = RECIPES["vatt-standin-digits"]()
    training = replace(run.training, total_images=images, batch=8, micro_batch=4, log_images=8, snapshot_images=1e9,
                       checkpoint_images=8, trackers=())  # fmt: skip
    return replace(run, data=StandinTripletsConfig(variants=1), network=NETWORK, training=training)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(tiny(), tmp_path_factory.mktemp("vatt") / "run")


def test_a_run_goes_on_with_the_same_bits(run: Path, tmp_path: Path) -> None:
    class Died(Exception):  # noqa: N818, a power cut
        pass

    def die(progress: Any) -> None:
        if progress.images == 16:
            raise Died

    with pytest.raises(Died):
        run_experiment(tiny(), tmp_path / "again", on_progress=die)
    run_experiment(tiny(), tmp_path / "again", resume=True)
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_a_run_is_measured_without_a_flag(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the same twice is one
        main(["evaluate", str(run), "--n", "40", "--device", "cpu"])
    assert "captions that look for their video among" in capsys.readouterr().out
    (entry,) = json.loads((run / "metrics.json").read_text())["retrievals"]
    report = entry["report"]
    assert report["clips"] == 26 and report["split"] == "test"
    assert 0 <= report["recall"]["r1"] <= report["recall"]["r10"] <= 1 <= report["median_rank"] <= 26
    assert {*report["probe"]} == {"video", "audio"} and {*report["by_class"]} == {"p1", "p10"}
    model: Any = find_model(str(run)).model
    assert model.of_texts(["a one again"]).shape == (1, 8) and PAD == 1
    main(["evaluate", str(run), "--n", "30", "--device", "cpu"])
    assert len(json.loads((run / "metrics.json").read_text())["retrievals"]) == 2
    capsys.readouterr()
    many = ["--n", "9999"], "--n is 9999; there are "
    for words, fault in (
        many,
        (["--n", "1"], "--n is 1; retrieval needs 2"),
        (["--metrics", "fd"], "--metrics has no effect"),
    ):
        with pytest.raises(SystemExit):
            main(["evaluate", str(run), *words, "--device", "cpu"])
        assert fault in capsys.readouterr().err
