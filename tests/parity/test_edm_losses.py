"""Our denoising losses against the official ones (Karras et al. 2022, EDMLoss, VPLoss, VELoss), and their gradients.

data/edm_losses.json says from which commit the numbers are and how images, noise and weights are made. Theirs is summed
over an image's numbers, ours is the mean.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from imagewright.data.augment import Augment
from imagewright.interop.official import from_official
from imagewright.methods.edm import EDM
from imagewright.types import Batch, Clock, Condition, Parts, Trained, Update

DATA = Path(__file__).parent / "data"
NETS = json.loads((DATA / "edm_nets.json").read_text())["configs"]["edm_ddpmpp"]
REFERENCE = json.loads((DATA / "edm_losses.json").read_text())["rows"]
N = 4
NUMBERS = 3 * 16 * 16
PRECONDITIONING = {"edm": "EDMPrecond", "vp": "VPPrecond", "ve": "VEPrecond"}


def generator(key: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed=zlib.crc32(key.encode())))


def normal(key: str, shape: list[int]) -> np.ndarray:
    return np.asarray(generator(key).standard_normal(shape)).astype(np.float32)


class Given:
    """The draws of the official run."""

    def uniform(self, like: Tensor) -> Tensor:
        return torch.from_numpy(generator("edm_losses/u").random(N).astype(np.float32)).to(like)

    def normal(self, like: Tensor) -> Tensor:
        key = "edm_losses/r" if like.dim() == 1 else "edm_losses/n"
        return torch.from_numpy(normal(key, list(like.shape))).to(like)


class AsTold(Augment):
    """No operation, and the parameters of the official run."""

    def __call__(self, images: Tensor, noise: object) -> tuple[Tensor, Tensor]:
        return images, torch.from_numpy(normal("edm_losses/augment", [N, 9]))


@pytest.mark.parametrize("row", REFERENCE)
def test_losses_and_gradients_are_the_official_ones(row: str) -> None:
    state = {
        key: normal(key, shape) * np.float32(mul) + np.float32(add)
        for key, shape, mul, add in NETS["params"]
        if mul is not None
    }
    config = NETS["config"] | {"precond_class": PRECONDITIONING[row]}
    denoiser = from_official(state, kind="edm", config=config).train()
    images = torch.from_numpy(normal("edm_losses/y", [N, 3, 16, 16]) * np.float32(0.5))
    batch = Batch(images, Condition(label=torch.tensor([3, 0, 7, 1])))
    method = EDM(preconditioning=row, augment=AsTold())  # type: ignore[arg-type]
    [update] = method.step(Parts(denoiser=Trained(module=denoiser)), batch, Given(), Clock(0, 0, 100))  # type: ignore[arg-type]
    assert isinstance(update, Update) and update.at is not None
    want = REFERENCE[row]
    np.testing.assert_allclose(update.at.numpy(), want["sigma"], rtol=2e-5)
    np.testing.assert_allclose(NUMBERS * update.loss.detach().numpy(), want["loss"], rtol=1e-4)
    (NUMBERS * update.loss.sum() / N).backward()
    found = {"model." + k.removeprefix("network."): p.grad for k, p in denoiser.named_parameters()}
    gradients = {k: g.double() for k, g in found.items() if g is not None}
    directions = {k: torch.from_numpy(normal(f"edm_losses/d/{k}", list(g.shape))) for k, g in gradients.items()}
    dots = {k: float((g * directions[k]).sum()) for k, g in gradients.items()}
    norm = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
    assert norm == pytest.approx(want["gradient_norm"], rel=1e-4)
    ours = [sum(dots.values()), dots["model.enc.16x16_conv.weight"], dots["model.dec.16x16_aux_conv.weight"]]
    np.testing.assert_allclose(ours, want["gradient_dots"], rtol=0, atol=1e-4 * norm)
