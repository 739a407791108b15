"""The autoregressive baseline: its loss is the likelihood, what it refuses, resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from imagewright.methods.autoregressive import Autoregressive
from imagewright.models.causal import CausalTokenModel
from imagewright.models.files import ModelFile, load_model, save_model
from imagewright.models.tokens import PixelCodec
from imagewright.networks import TokenTransformer, TokenTransformerConfig
from imagewright.noise import StepNoise
from imagewright.oracles import MarkovChain, MarkovTokens
from imagewright.recipes import RECIPES
from imagewright.training.experiment import Experiment, assemble
from imagewright.types import Batch, Clock, Condition, DataSpec, Parts, Trained, Update, UserError

CONFIG = TokenTransformerConfig(values=256, length=16, label_dim=2, width=16, depth=1, heads=2, causal=True)
SPEC = DataSpec(name="test", resolution=4, channels=1, num_classes=2)
CLOCK = Clock(step=0, images=0, total_images=1)


def update(parts: Parts, images: torch.Tensor, cond: Condition) -> Update:
    (event,) = Autoregressive().step(parts, Batch(images, cond), StepNoise(0), CLOCK)
    assert isinstance(event, Update)
    return event


def images_and_labels(n: int = 6) -> tuple[torch.Tensor, Condition]:
    levels = torch.randint(256, (n, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    return levels / 127.5 - 1, Condition(label=torch.arange(n) % 2)


def test_the_loss_is_the_likelihood_over_the_tokens() -> None:
    torch.manual_seed(0)
    parts = Autoregressive().parts(network=TokenTransformer(CONFIG).eval(), codec=PixelCodec(4, 1), spec=SPEC)
    images, cond = images_and_labels()
    event = update(parts, images, cond)
    nats = parts.model.nll(parts.model.codec.encode(images), cond)
    assert nats.dtype == torch.float64
    torch.testing.assert_close(event.loss.double(), nats / 16, rtol=1e-5, atol=0)
    torch.testing.assert_close(event.parts["bits_per_token"], event.loss / math.log(2))
    assert nats.mean().item() / 16 == pytest.approx(math.log(256), abs=0.1)  # at the start all values are likely alike


def test_the_exact_model_of_a_chain_has_its_entropy_as_loss() -> None:
    rows = torch.rand(257, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 8
    rows /= rows.sum(1, keepdim=True)
    chain = MarkovChain(rows[0], rows[1:], 16)
    codec = PixelCodec(4, 1)
    exact = MarkovTokens(chain, codec)
    parts = Parts(model=Trained(module=exact))  # type: ignore[arg-type]
    images = codec.decode(chain.sample(4000, StepNoise(3)))
    loss = update(parts, images, Condition()).loss
    error = float(loss.std()) / math.sqrt(len(loss))
    assert float(loss.mean()) == pytest.approx(chain.entropy() / 16, abs=3 * error)


def test_labels_matter_and_gradients_reach_everything() -> None:
    torch.manual_seed(0)
    network = TokenTransformer(CONFIG)
    parts = Autoregressive().parts(network=network, codec=PixelCodec(4, 1), spec=SPEC)
    images, cond = images_and_labels()
    update(parts, images, cond).loss.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    used = network.tokens.weight.grad.abs().sum(1) > 0
    # The head ties all 256 values; the two classes are told; the unknown token and "no class" are not.
    assert used.tolist() == [True] * 256 + [False, True, True, False]


def test_what_does_not_fit_is_named() -> None:
    network = TokenTransformer(replace(CONFIG, causal=False))
    with pytest.raises(UserError, match=r"network.causal is False; an autoregressive model needs"):
        Autoregressive().parts(network=network, codec=PixelCodec(4, 1), spec=SPEC)
    model = CausalTokenModel(TokenTransformer(CONFIG), PixelCodec(4, 1))
    with pytest.raises(UserError, match=r"token 256 is none of the codec's; they are 0 to 255"):
        model.nll(torch.full((1, 16), 256))
    with pytest.raises(UserError, match=r"tokens are \[1, 15\]; the codec's are \[N, 16\]"):
        model.nll(torch.zeros(1, 15, dtype=torch.int64))


def test_a_model_comes_back_from_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CausalTokenModel(TokenTransformer(CONFIG), PixelCodec(4, 1)).eval()
    save_model(tmp_path, ModelFile(model=model, spec=SPEC))
    assert '"kind": "token_model"' in (tmp_path / "model.json").read_text()
    tokens = model.codec.encode(images_and_labels()[0])
    torch.testing.assert_close(load_model(tmp_path).model.nll(tokens), model.nll(tokens), rtol=0, atol=0)


def test_resuming_changes_no_bit(resumed_run: Callable[[Experiment], Path]) -> None:
    base = RECIPES["causal-digits"]()
    small = replace(base.network, width=16, depth=1, heads=2)
    sizes = {"total_images": 48, "batch": 16, "micro_batch": 8, "log_images": 16, "snapshot_images": 48}
    run = replace(base, network=small, training=replace(base.training, checkpoint_images=16, **sizes))

    resumed_run(run)


@pytest.mark.parametrize("name", ["causal-digits", "causal-emoji64-16", "causal-emoji64-32"])
def test_recipes_are_whole(name: str) -> None:
    experiment = RECIPES[name]()
    assert experiment.network.causal
    assert not experiment.network.post_norm
    assert isinstance(experiment.method, Autoregressive)


def test_a_run_takes_the_grid_of_its_tokens_from_the_codec() -> None:
    experiment = replace(RECIPES["causal-emoji64-16"](), network=replace(CONFIG, label_dim=0))
    network = assemble(experiment).parts.model.network
    assert [len(table) for table in network.positions] == [16, 16, 3]  # rows, columns, colours of a pixel
