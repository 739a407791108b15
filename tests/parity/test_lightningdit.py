"""LightningDiT's network, losses, guidance and steps against numbers of the published program.

data/lightningdit.json holds the rule that makes weights and inputs, and says from which commit the outputs are;
data/lightningdit.npz holds them. Bar: 5e-5 of their size, or absolute; a few times that for steps
and guidance, which multiply it. No published weights are at hand.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imagewright.cli.main import main
from imagewright.guidance import classifier_free
from imagewright.interop.lightningdit import told_by
from imagewright.interop.official import from_official
from imagewright.interop.reading import read_official
from imagewright.methods.flow_matching import FlowMatching
from imagewright.models.description import build, describe
from imagewright.models.files import ModelFile, load_model, save_model
from imagewright.models.flow import VelocityFlow
from imagewright.models.kl import GaussianAutoencoder
from imagewright.networks import DiT, DiTConfig, KLAutoencoder, KLAutoencoderConfig
from imagewright.paths.conversions import velocity_of
from imagewright.paths.gaussian import Linear
from imagewright.samplers import Straight
from imagewright.types import Batch, Clock, Condition, DataSpec, Parts, Trained, Update, UserError

DATA = Path(__file__).parent / "data"
REFERENCE = json.loads((DATA / "lightningdit.json").read_text())
NETWORKS = REFERENCE["networks"]
LABELS, TIMES = torch.tensor([0, 1, 2, -1]), 1 - torch.tensor(REFERENCE["times"])
OUTPUTS = dict(np.load(DATA / "lightningdit.npz"))


def normal(key: str, shape: list[int]) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(seed=zlib.crc32(key.encode())))
    return np.asarray(generator.standard_normal(shape)).astype(np.float32)


def official_state(name: str) -> dict[str, np.ndarray]:
    weights = {
        key: np.asarray(normal(key, shape) * np.float32(mul) + np.float32(add), np.float32)
        for key, shape, mul, add in NETWORKS[name]["params"]
    }
    digest = sha256(b"".join(v.tobytes() for v in weights.values())).hexdigest()
    assert digest == NETWORKS[name]["weights_sha256"]
    return weights | {key: OUTPUTS[f"{name}.{key}"] for key, _ in NETWORKS[name]["constants"]}


def read(name: str) -> VelocityFlow:
    model = from_official(official_state(name), "lightningdit", NETWORKS[name]["config"])
    assert isinstance(model, VelocityFlow)
    return model


def pictures(name: str) -> Tensor:
    c = NETWORKS[name]["config"]
    return torch.from_numpy(normal(f"x.{name}", [4, c["in_channels"], c["input_size"], c["input_size"]]))


def close(ours: Tensor, name: str, atol: float = 5e-5) -> None:
    torch.testing.assert_close(ours.detach().float(), torch.from_numpy(OUTPUTS[name]), rtol=5e-5, atol=atol)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_gives_the_official_answers(name: str) -> None:
    model = read(name)
    with torch.no_grad():
        close(-model.velocity(pictures(name), TIMES, Condition(label=LABELS)), f"{name}.answer")
    again = build(describe(model))
    again.load_state_dict(model.state_dict())
    x, sigma = pictures(name)[1:3], torch.tensor([0.5, 2.0])
    assert torch.equal(again.eval()(x, sigma), model(x, sigma))


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_tell_the_configuration(name: str) -> None:
    told = told_by({k: torch.from_numpy(v) for k, v in official_state(name).items()})
    if name == "plain":  # neither rotary positions nor norms of heads
        assert "num_heads" not in told
        told["num_heads"] = 4
    # A ratio that only such small widths cannot tell to the last digit; the hidden width is the file's.
    ours, theirs = from_official(official_state(name), "lightningdit", told), read(name)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert {k: v for k, v in told.items() if k != "mlp_ratio"}.items() >= NETWORKS[name]["config"].items()


@pytest.mark.parametrize("name", REFERENCE["counts"])
def test_networks_have_the_official_number_of_parameters(name: str) -> None:
    whole, learnt, depth, width, heads, patch = REFERENCE["counts"][name]
    with torch.device("meta"):
        network = DiT(DiTConfig(img_resolution=16, in_channels=32, out_channels=32, label_dim=1000, depth=depth,
                                width=width, heads=heads, patch=patch))  # fmt: skip
    count = sum(p.numel() for p in network.parameters())
    assert (count, count + network.positions.numel()) == (learnt, whole)


def test_the_largest_published_network_is_the_default() -> None:
    config = DiTConfig(img_resolution=16, in_channels=32, out_channels=32)
    assert [config.depth, config.width, config.heads, config.patch] == REFERENCE["counts"]["LightningDiT-XL/1"][2:]


@pytest.mark.parametrize("time", [0.05, 0.1, 0.6])
def test_guidance_moves_three_channels_within_its_interval(time: float) -> None:
    guided = classifier_free(read("xl"), 3.0, (0.0, (1 - 0.1) / 0.1 + 1e-6), channels=3)
    x, t = pictures("xl")[:2].double(), torch.full((2,), 1 - time, dtype=torch.float64)
    with torch.no_grad():
        velocity = velocity_of(guided, Linear())(x, t, Condition(label=torch.tensor([0, 2])))
    close(-velocity, f"xl.guided.{time}", atol=2e-4)


def test_steps_on_the_shifted_grid() -> None:
    sampler, model = Straight(num_steps=6, order=1, shift=0.3), read("xl")
    close(sampler(model, pictures("xl"), Condition(label=LABELS)), "xl.drawn", atol=5e-4)
    guided = classifier_free(model, 3.0, (0.0, 9.0), channels=3)
    close(sampler(guided, pictures("xl")[:2], Condition(label=torch.tensor([0, 2]))), "xl.drawn-guided", atol=2e-3)
    plain = Straight(num_steps=6, order=1)(model, pictures("xl"), Condition(label=LABELS))
    assert float((plain - torch.from_numpy(OUTPUTS["xl.drawn"])).abs().max()) > 0.05


class Told:
    """The official program's times, and its noise."""

    def sample(self, noise: Any, like: Tensor) -> Tensor:
        t = torch.tensor(REFERENCE["loss_times"], dtype=torch.float64)
        return (1 - t) / t

    def normal(self, like: Tensor) -> Tensor:
        return torch.from_numpy(normal("noise", list(like.shape)))


def test_both_losses() -> None:
    method = FlowMatching(times=Told(), direction=1.0)  # type: ignore[arg-type]
    batch = Batch(pictures("xl"), Condition(label=LABELS))
    (event,) = method.step(Parts(flow=Trained(module=read("xl"))), batch, Told(), Clock(0, 0, 10))  # type: ignore[arg-type]
    assert isinstance(event, Update)
    close(event.parts["velocity"], "xl.loss")
    close(event.parts["direction"], "xl.cos_loss")
    torch.testing.assert_close(event.loss, event.parts["velocity"] + event.parts["direction"])


def test_a_file_of_training_becomes_a_model(tmp_path: Path) -> None:
    weights = {key: torch.from_numpy(value) for key, value in official_state("xl").items()}
    torch.save({"model": {k: 0 * v for k, v in weights.items()}, "ema": weights}, tmp_path / "tiny.pt")
    main(["import", str(tmp_path / "tiny.pt"), "--key", "ema", "--out", str(tmp_path / "model")])
    file = load_model(tmp_path / "model")
    assert (file.spec.resolution, file.spec.channels, file.spec.num_classes) == (4, 5, 3)
    x, sigma = pictures("xl")[:2], torch.tensor([0.5, 2.0])
    assert torch.equal(file.model(x, sigma), read("xl")(x, sigma))


@pytest.mark.parametrize(("change", "says"), [
    ({"num_heads": 4}, "table 'feat_rope"), ({"use_swiglu": False}, "does not fit"), ({"fused": True}, "unknown"),
    ({"input_size": 8}, "pos_embed"), ({"hidden_size": 18}, "divisible by 4"),
])  # fmt: skip
def test_what_does_not_fit_is_said(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        from_official(official_state("xl"), "lightningdit", NETWORKS["xl"]["config"] | change)


def test_weights_of_dit_or_sit_are_read_when_it_is_said_which(tmp_path: Path) -> None:
    torch.save({key: torch.from_numpy(value) for key, value in official_state("plain").items()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="--kind lightningdit"):
        read_official(tmp_path / "a.pt")
    found = read_official(tmp_path / "a.pt", kind="lightningdit", config={"num_heads": 4})
    x, sigma = pictures("plain")[:2], torch.tensor([0.5, 2.0])
    assert torch.equal(found.model(x, sigma), read("plain")(x, sigma))


def test_a_model_of_latents_draws_pictures_with_their_autoencoder(tmp_path: Path, refused: Callable[..., str]) -> None:
    weights = {key: torch.from_numpy(value) for key, value in official_state("xl").items()}
    torch.save(weights, tmp_path / "tiny.pt")
    torch.manual_seed(0)
    config = KLAutoencoderConfig(
        img_resolution=8, in_channels=1, latent_channels=5, model_channels=8, channel_mult=(1, 1), num_blocks=1,
        attn_resolutions=(),
    )  # fmt: skip
    spec = DataSpec(name="grey", resolution=8, channels=1)
    save_model(tmp_path / "kl", ModelFile(model=GaussianAutoencoder(KLAutoencoder(config)), spec=spec))
    torch.save(
        {"mean": torch.arange(5.0).view(1, 5, 1, 1), "std": torch.full((1, 5, 1, 1), 2.0)}, tmp_path / "stats.pt"
    )
    words = [
        "import",
        str(tmp_path / "tiny.pt"),
        "--out",
        str(tmp_path / "model"),
        "--autoencoder",
        str(tmp_path / "kl"),
    ]
    assert "needs --latent-stats" in refused(*words)
    main([*words, "--latent-stats", str(tmp_path / "stats.pt")])
    file = load_model(tmp_path / "model")
    assert file.space is not None and file.space.mean.tolist() == [0, 1, 2, 3, 4] and file.space.scale == 1.0
    assert (file.spec.resolution, file.spec.channels, file.spec.num_classes) == (8, 1, 3)
    drawing = ["--n", "1", "--sampler", "straight", "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "drawn")]
    main(["sample", str(tmp_path / "model"), *drawing])
    assert (tmp_path / "drawn" / "000000.png").exists()
    main([*words[:2], "--out", str(tmp_path / "bare")])
    assert "of 5 channels" in refused("sample", str(tmp_path / "bare"), *drawing[:-1], str(tmp_path / "none"))
    assert "no effect" in refused(*words[:4], "--latent-stats", str(tmp_path / "stats.pt"))
