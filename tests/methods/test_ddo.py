"""DDO: its loss on laws that can be written down, Delta in three forms, tokens, negatives, rounds, bad input."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.cli.main import main
from imagewright.data.negatives import Negatives, NegativesManifest, begin, read_manifest, shard_path, write_shard
from imagewright.methods.ddo import DDO, discriminative_loss, token_ratio
from imagewright.models.causal import CausalTokenModel
from imagewright.models.files import ModelFile
from imagewright.models.masked_diffusion import MaskedDiffusionModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.tokens import PixelCodec
from imagewright.networks import SongUNet, SongUNetConfig, TokenTransformer, TokenTransformerConfig
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogNormal
from imagewright.recipes import RECIPES
from imagewright.recipes.ddo import self_play
from imagewright.samplers import Raster
from imagewright.training.experiment import Experiment, run_experiment
from imagewright.training.self_play import DrawNegatives, with_tokens_shown
from imagewright.types import UNCONDITIONAL, Batch, Clock, Condition, DataSpec, Update, UserError

SPEC = DataSpec(name="toy", resolution=4, channels=1, num_classes=3)
DATA = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15]).double()
REFERENCE = torch.tensor([0.3, 0.1, 0.25, 0.15, 0.2]).double()


def expected_loss(logits: Tensor, alpha: float, beta: float, reference: Tensor = REFERENCE) -> Tensor:
    """The loss's expectation on a categorical law of five symbols."""
    ratio = logits.log_softmax(0) - reference.log()
    terms = discriminative_loss(ratio, ratio, 0.0, beta), discriminative_loss(ratio, ratio, alpha, beta)
    return (DATA * terms[0]).sum() + (reference * (terms[1] - terms[0])).sum()


# --- a categorical law ------------------------------------------------------------------------------------------------


def test_loss_and_gradient_at_the_start() -> None:
    alpha, beta = 3.0, 0.4
    logits = REFERENCE.log().clone().requires_grad_()
    loss = expected_loss(logits, alpha, beta)
    assert float(loss.detach()) == pytest.approx((1 + alpha) * math.log(2))
    (got,) = torch.autograd.grad(loss, logits)
    log_p = logits.log_softmax(0)
    (wanted,) = torch.autograd.grad(-beta / 2 * ((DATA * log_p).sum() - alpha * (REFERENCE * log_p).sum()), logits)
    torch.testing.assert_close(got, wanted)
    (second,) = torch.autograd.grad((REFERENCE * logits.log_softmax(0)).sum(), logits)
    assert float(second.abs().max()) < 1e-12  # the negatives' term vanishes for an exact model


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_optimum_is_the_datas_law_or_beyond_it(beta: float) -> None:
    """p* ~ reference^(1 - 1/beta) data^(1/beta), where alpha makes it one that sums to 1."""
    raw = REFERENCE ** (1 - 1 / beta) * DATA ** (1 / beta)
    wanted = raw / raw.sum()
    # At the optimum alpha reference (p / reference)^beta = data.
    alpha = float((DATA / REFERENCE * (REFERENCE / wanted) ** beta)[0])
    logits = REFERENCE.log().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], lr=1.0, max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = expected_loss(logits, alpha, beta)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call, arg-type]
    torch.testing.assert_close(logits.detach().softmax(0), wanted, rtol=1e-5, atol=0)
    assert (alpha == pytest.approx(1.0)) == (beta == 1)


def test_the_gradient_is_that_of_a_discriminator() -> None:
    """Alpha = beta = 1: (1 - d)(p - data) grad log p, summed, with d = p / (p + reference)."""
    logits = torch.tensor([0.3, -0.2, 0.5, 0.0, -0.4]).double().requires_grad_()
    (got,) = torch.autograd.grad(expected_loss(logits, 1.0, 1.0), logits)
    log_p = logits.log_softmax(0)
    p = log_p.exp().detach()
    d = p / (p + REFERENCE)
    (wanted,) = torch.autograd.grad(((1 - d) * (p - DATA) * log_p).sum(), logits)
    torch.testing.assert_close(got, wanted)


def test_large_ratios_stay_finite() -> None:
    ratio = torch.tensor([-1e6, 0.0, 1e6], requires_grad=True)
    loss = discriminative_loss(ratio, ratio, 2.0, 1.0)
    assert bool(loss.isfinite().all()) and bool(torch.autograd.grad(loss.sum(), ratio)[0].isfinite().all())


# --- denoisers --------------------------------------------------------------------------------------------------------


def denoiser(seed: int = 5, dropout: float = 0.3, resolution: int = 4) -> EDMPrecond:
    torch.manual_seed(seed)
    config = SongUNetConfig(img_resolution=resolution, in_channels=1, out_channels=1, label_dim=3, model_channels=8,
                            channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=dropout)  # fmt: skip
    network = SongUNet(config)
    for p in network.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3 * p[0].numel() ** -0.5)
    return EDMPrecond(network.double())


def store(folder: Path, drawn: Tensor, what: Any = "images", classes: int = 3, shard: int = 4) -> Negatives:
    manifest = NegativesManifest(n=len(drawn), seed=0, shard=shard, what=what, shape=tuple(drawn.shape[1:]),
                                 classes=classes, origin={"weights_sha256": "ab"})  # fmt: skip
    begin(folder, manifest)
    for index in range(manifest.shards):
        rows = manifest.rows(index)
        labels = torch.arange(rows.start, rows.stop) % max(classes, 1)
        write_shard(folder, manifest, index, drawn[rows.start : rows.stop], labels)
    return Negatives(folder)


def images(n: int = 10, seed: int = 0) -> Tensor:
    return 0.5 * StepNoise(seed).normal(torch.empty(n, 1, 4, 4, dtype=torch.float64))


def parts_of(method: DDO, folder: Path) -> Any:
    known = denoiser().eval().requires_grad_(False)
    return method.parts(reference=known, negatives=store(folder, images(seed=1)), spec=SPEC)


def update(method: DDO, parts: Any, n: int = 6) -> Update:
    batch = Batch(images(n), Condition(label=torch.arange(n) % 3))
    (event,) = method.step(parts, batch, StepNoise(3), Clock(0, 0, 1))
    assert isinstance(event, Update)
    return event


def test_delta_is_zero_at_the_start_whatever_the_dropout(tmp_path: Path) -> None:
    parts = parts_of(DDO(), tmp_path)
    parts.model.train()
    got = update(DDO(alpha=3.0), parts)
    assert torch.equal(got.loss, torch.full_like(got.loss, 4 * math.log(2)))
    got.loss.sum().backward()
    assert parts.model.training
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parts.model.parameters())
    assert all(p.grad is None for p in parts.reference.parameters())


def test_delta_in_three_forms(tmp_path: Path) -> None:
    """-(|F - F*|^2 - |F_ref - F*|^2), and by x0 and eps with their weights; sums over an image's numbers."""
    method = DDO(levels=LogNormal(mean=-0.5, std=1.0))
    parts = parts_of(method, tmp_path)
    for p in parts.model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x, cond = images(), Condition(label=torch.arange(10) % 3)
    with torch.no_grad():
        parts.model.eval()
        got = method.image_ratio(parts, x, cond, StepNoise(7))
        noise = StepNoise(7)
        sigma = method.levels.sample(noise, x[:, 0, 0, 0])
        eps = noise.normal(x)
        level = sigma[:, None, None, None]
        noisy = x + level * eps
        errors: dict[str, list[Tensor]] = {"F": [], "x0": [], "eps": []}
        for model in (parts.model, parts.reference):
            s = model.scalings(sigma)
            skip, out, scale = (v[:, None, None, None] for v in (s.c_skip, s.c_out, s.c_in))
            raw = model.network(scale * noisy, s.c_noise, cond)
            clean = skip * noisy + out * raw
            errors["F"].append((raw - (x - skip * noisy) / out).square().flatten(1).sum(1))
            errors["x0"].append((clean - x).square().flatten(1).sum(1) * (sigma**2 + 0.25) / (sigma * 0.5) ** 2)
            errors["eps"].append(((noisy - clean) / level - eps).square().flatten(1).sum(1) * (sigma**2 + 0.25) / 0.25)
    for ours, theirs in errors.values():
        torch.testing.assert_close(got, theirs - ours, rtol=1e-9, atol=1e-12)
    assert float(got.abs().min()) > 0


def test_negatives_keep_their_classes_and_are_told_apart(tmp_path: Path) -> None:
    """The drawn half is what the store has at rows drawn at random, with their classes."""
    method = DDO(alpha=2.0, beta=0.3)
    parts = parts_of(method, tmp_path)
    for p in parts.model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    got, noise = update(method, parts), StepNoise(3)
    rows = noise.integers(10, torch.empty(6, dtype=torch.float64))
    drawn, cond = images(seed=1).float().double()[rows], Condition(label=rows % 3)
    parts.model.eval()
    of_real = method.image_ratio(parts, images(6), Condition(label=torch.arange(6) % 3), noise)
    of_drawn = method.image_ratio(parts, drawn, cond, noise)
    torch.testing.assert_close(got.loss, -torch.sigmoid(0.3 * of_real).log() - 2 * torch.sigmoid(-0.3 * of_drawn).log())


# --- tokens -----------------------------------------------------------------------------------------------------------


def token_model(seed: int = 0) -> CausalTokenModel:
    torch.manual_seed(seed)
    config = TokenTransformerConfig(values=4, length=16, width=16, depth=1, heads=2, dropout=0.2, causal=True,
                                    post_norm=False, channels=1, label_dim=3)  # fmt: skip
    network = TokenTransformer(config)
    for p in network.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return CausalTokenModel(network.double(), PixelCodec(4, 1, 4))


def test_tokens_are_compared_by_their_exact_likelihoods(tmp_path: Path) -> None:
    known = token_model().eval().requires_grad_(False)
    tokens = torch.arange(160).reshape(10, 16) % 4
    negatives = store(tmp_path, tokens, "tokens")
    parts: Any = DDO().parts(reference=known, negatives=negatives, spec=SPEC)
    got = update(DDO(alpha=1.5), parts)
    torch.testing.assert_close(got.loss, torch.full_like(got.loss, 2.5 * math.log(2)))
    assert torch.equal(got.parts["log_ratio_real"], torch.zeros_like(got.loss))
    for p in parts.model.network.parameters():
        p.data += 0.1 * torch.randn_like(p)
    cond = Condition(label=torch.arange(10) % 3)
    parts.model.eval()
    ratio = token_ratio(parts, tokens, cond)
    chain = [model.logits(tokens, cond).log_softmax(2).gather(2, tokens[..., None]).sum((1, 2))
             for model in (parts.model, parts.reference)]  # fmt: skip
    torch.testing.assert_close(ratio, chain[0] - chain[1])
    assert float(ratio.detach().abs().min()) > 0
    read, told = negatives.read(torch.tensor([7, 2]))
    assert torch.equal(read, tokens[[7, 2]]) and told.label is not None and told.label.tolist() == [1, 2]


def test_a_codec_that_loses_hands_its_tokens_on() -> None:
    model = token_model().eval()
    file = ModelFile(model=model, spec=SPEC)
    shown: Any = with_tokens_shown(file).model
    like, noise = torch.zeros(3, 1, 4, 4), StepNoise(5)
    tokens = Raster()(shown, like, Condition(label=torch.tensor([0, 1, 2])), noise=noise)
    decoded = Raster()(model, like, Condition(label=torch.tensor([0, 1, 2])), noise=StepNoise(5))
    assert tokens.dtype == torch.int64 and torch.equal(model.codec.decode(tokens), decoded)


# --- rounds -----------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"total_images": 32, "batch": 16, "log_images": 16, "snapshot_images": 32,
                         "checkpoint_images": 16}  # fmt: skip
FILE = """
from dataclasses import replace
from imagewright.recipes import RECIPES
from imagewright.recipes.ddo import self_play
run = RECIPES["ddo-digits"]()
run = replace(run.giving(reference="teacher"), training=replace(run.training, **{small}))
experiment = self_play(run, rounds=2, n=20)
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddo")
    base = RECIPES["edm-digits"]()
    network = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                             num_blocks=1, attn_resolutions=())  # fmt: skip
    sampler = replace(base.sampler, num_steps=2)
    run = replace(base, network=network, sampler=sampler, training=replace(base.training, **SMALL))
    return run_experiment(run, folder / "teacher")


def test_rounds_are_one_command(teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(teacher.parent)
    Path("play.py").write_text(FILE.replace("{small}", repr(SMALL)))
    main(["train", "play.py", "--dry-run"])
    assert "stage round2" in capsys.readouterr().out
    short = ["--draw1.shard", "8", "--best1.n", "4", "--best2.n", "4", "--round1.training.weights-images", "16"]
    main(["train", "play.py", "--device", "cpu", *short])
    second = read_manifest(Path("runs/play/4-draw2"))
    first = read_manifest(Path("runs/play/1-draw1"))
    assert (first.shards, second.n, second.classes) == (3, 20, 10)
    inputs = json.loads(Path("runs/play/5-round2/experiment.json").read_text())["inputs"]
    assert inputs["negatives"]["weights_sha256"] == inputs["reference"]["weights_sha256"]
    best = json.loads(Path("runs/play/3-best1/model.json").read_text())
    scores = best["origin"]["scores"]
    assert set(scores) == {"reference", "average", "raw, 16 images", "raw, 32 images"}
    assert scores[best["origin"]["kept"]] == min(scores.values())
    assert second.origin["weights_sha256"] == best["weights_sha256"]
    kept = [shard_path(Path("runs/play/1-draw1"), i).read_bytes() for i in range(3)]
    shard_path(Path("runs/play/1-draw1"), 1).unlink()
    main(["train", "--resume", "runs/play", "--device", "cpu"])
    assert [shard_path(Path("runs/play/1-draw1"), i).read_bytes() for i in range(3)] == kept


def test_alpha_and_beta_are_swept_from_one_reference(teacher: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "round.py").write_text(
        FILE.replace("{small}", repr(SMALL)).replace("self_play(run, rounds=2, n=20)", "run")
    )
    words = ["tune", "ddo", str(tmp_path / "round.py"), "--reference", str(teacher), "--samples", "12", "--n", "6",
             "--alphas", "1", "--betas", "0.02", "0.1", "--device", "cpu",
             "--out", str(tmp_path / "swept")]  # fmt: skip
    main(words)
    told = capsys.readouterr().out
    scores = []
    for beta in ("0.02", "0.1"):
        folder = tmp_path / f"swept/alpha1-beta{beta}"
        method = json.loads((folder / "experiment.json").read_text())["experiment"]["method"]
        assert (method["alpha"], method["beta"]) == (1.0, float(beta))
        origin = json.loads((folder / "best/model.json").read_text())["origin"]
        scores.append(origin["scores"][origin["kept"]])
    best = json.loads((tmp_path / "swept/model.json").read_text())["origin"]
    assert best["scores"][best["kept"]] == min(scores) and "written to" in told
    with pytest.raises(SystemExit):
        main(words)  # there is a model now
    with pytest.raises(SystemExit):
        main(["tune", "ddo", "cd-digits", "--out", str(tmp_path / "other")])
    assert "tune ddo takes a round of DDO" in " ".join(capsys.readouterr().err.split())


def test_resuming_a_round_changes_no_bit(teacher: Path, tmp_path: Path, resumed_run: Any) -> None:
    DrawNegatives(given={"model": str(teacher)}, n=12)(tmp_path / "drawn", {}, "cpu")
    run = RECIPES["ddo-digits"]().giving(reference=str(teacher), negatives=str(tmp_path / "drawn"))
    sizes = SMALL | {"total_images": 48, "snapshot_images": 48, "micro_batch": 8}
    resumed_run(replace(run, sampler=replace(run.sampler, num_steps=2), training=replace(run.training, **sizes)))


def test_self_play_goes_from_round_to_round() -> None:
    stages = {stage.name: stage.work for stage in self_play("ddo-digits", rounds=2, n=7).stages}
    assert list(stages) == ["draw1", "round1", "best1", "draw2", "round2", "best2"]
    draw, learn = stages["draw2"], stages["round2"]
    assert isinstance(draw, DrawNegatives) and dict(draw.given) == {"model": "stage:best1"} and draw.n == 7
    assert isinstance(learn, Experiment)
    assert dict(learn.given) == {"reference": "stage:best1", "negatives": "stage:draw2"}


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_bad_settings(name: str) -> None:
    with pytest.raises(UserError, match=rf"method\.{name} is 0\.0; it must be positive and finite"):
        DDO(**{name: 0.0})


def test_other_references_and_negatives_are_refused(tmp_path: Path) -> None:
    negatives = store(tmp_path / "a", images(4), classes=0)
    with pytest.raises(UserError, match=r"negatives are images \[1, 4, 4\] of 0 classes; this reference takes images"):
        DDO().parts(reference=denoiser(), negatives=negatives, spec=SPEC)
    with pytest.raises(UserError, match="reference takes tokens"):
        DDO().parts(reference=token_model(), negatives=negatives, spec=SPEC)
    causal = token_model()
    config = replace(causal.network.config, causal=False)  # type: ignore[type-var]
    masked = MaskedDiffusionModel(TokenTransformer(replace(config, values=4)), causal.codec)
    with pytest.raises(UserError, match="MaskedDiffusionModel, whose likelihood is not exact"):
        DDO().parts(reference=masked, negatives=negatives, spec=SPEC)


def test_broken_stores_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no negatives: it has no manifest\.json"):
        Negatives(tmp_path)
    negatives = store(tmp_path, images(10))
    shard_path(tmp_path, 1).unlink()
    with pytest.raises(UserError, match=r"drawn-000001\.safetensors is missing, or not of its size"):
        Negatives.open(str(tmp_path))
    with pytest.raises(UserError, match="holds what another model, sampler or seed drew"):
        begin(tmp_path, replace(negatives.manifest, seed=2))
    assert SimpleNamespace(**negatives.identity).examples == 10


def test_the_start_is_unconditional_where_there_are_no_classes(tmp_path: Path) -> None:
    _, cond = store(tmp_path, images(4), classes=0).read(torch.tensor([0]))
    assert cond == UNCONDITIONAL
