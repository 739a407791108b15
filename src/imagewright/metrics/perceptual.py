"""Networks that images are compared by while something trains: our shipped classifiers, any encoder, or LPIPS.

Source   Zhang et al. 2018 (LPIPS, arXiv 1801.03924), version 0.1 with VGG-16, from the optional package `lpips`. Our
         classifiers stand in where nothing may be downloaded; a distance in their features (fd_digits, fd_emoji) is
         then measured by the network that was trained against, which flatters it.
Pooling  "lpips" pools by maxima, as published; "lpips-average" by means, as the programs of CTM, of consistency models
         on ImageNet-64 and of DMD2's regression do (piq's LPIPS with `replace_pooling`), with the same learned weights.
         "vgg" is the backbone alone, without the learned weights and at the images' own size, as DSNO's program has it.
Size     images are brought to 224 x 224; with "lpips-64" to 64 x 64, corners on corners, as SlimFlow's program does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagewright.metrics.extractors import OF_DATA, SHIPPED, named_extractor
from imagewright.models.view import seen
from imagewright.networks import ConvClassifier
from imagewright.types import DataSpec, UserError

INSTALLED = ("lpips", "lpips-average", "lpips-64", "vgg")
"""Those that have to be installed."""
CHOICES = (*SHIPPED, *INSTALLED)
"""Those that are named, and lie nowhere."""
VGG_FILE = "vgg16-397923af.pth"
"""The backbone's weights, by torchvision's name for them."""
LPIPS_SIDE = 224


class EncoderMaps(nn.Module):
    """What an encoder makes of images at each of its stages, or its tokens, frozen; images are brought to its view.

    forward: [N, C, H, H] in [-1, 1] -> maps [N, C_i, H_i, W_i], the finest first, differentiable. Raises UserError on
    images that the encoder cannot take. sha256: of its weights.
    """

    def __init__(self, encoder: Any, sha256: str) -> None:
        super().__init__()
        self.encoder, self.sha256 = encoder, sha256
        network = getattr(encoder, "network", None)
        self.stages = nn.ModuleList()
        if isinstance(network, ConvClassifier):
            layers = list(network.body)
            ends = [i for i, layer in enumerate(layers) if isinstance(layer, nn.AvgPool2d)]
            borders = zip([0, *ends], [*ends, len(layers)], strict=True)
            self.stages = nn.ModuleList(nn.Sequential(*layers[first:last]) for first, last in borders)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        if not self.stages:
            made = self.encoder.encode(images)
            if made.tokens is None:
                return [made.pooled[:, :, None, None]]
            return [made.tokens.mT.unflatten(2, made.grid)]
        x, maps = seen(images, self.encoder.view), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class LPIPS(nn.Module):
    """The published distance, learned weights included; `network` is the package's module, which sees side x side.

    corners: whether the outermost values are enlarged onto each other (torch's align_corners).
    """

    def __init__(self, network: nn.Module, side: int = LPIPS_SIDE, corners: bool = False) -> None:
        super().__init__()
        self.side, self.corners = side, corners
        self.network = network.requires_grad_(False).eval()

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b: [N, C, H, W] in [-1, 1], C = 1 or 3; enlarged (bilinear). Returns [N]."""
        distance: Tensor = self.network(self._enlarged(a), self._enlarged(b))
        return distance.flatten()

    def forward(self, images: Tensor) -> list[Tensor]:
        """The backbone's five maps [N, C_i, H_i, W_i], without the learned weights."""
        network: Any = self.network
        return list(network.net(network.scaling_layer(self._enlarged(images))))

    def _enlarged(self, images: Tensor) -> Tensor:
        x, size = images.expand(-1, 3, -1, -1), (self.side, self.side)
        if x.shape[2:] == size:
            return x
        return nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=self.corners)


class Backbone(nn.Module):
    """LPIPS's VGG-16 alone, for distances between its five maps; `network` is the package's module."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """[N, C, H, W] in [-1, 1], C = 1 or 3 -> maps [N, C_i, H_i, W_i]."""
        network: Any = self.network
        return list(network.net(network.scaling_layer(images.expand(-1, 3, -1, -1))))


def normalised_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """LPIPS without learned weights: of two pictures' maps [N, C_i, H_i, W_i], over channels of norm 1, [N]."""
    return torch.stack([_normalised_l2(u, v) for u, v in zip(ours, theirs, strict=True)]).sum(0)


def _normalised_l2(a: Tensor, b: Tensor) -> Tensor:
    normalize = nn.functional.normalize
    return (normalize(a, dim=1) - normalize(b, dim=1)).square().sum(1).flatten(1).mean(1)


def perceptual_network(name: str | None, spec: DataSpec) -> nn.Module | None:
    """The network of a name; None: the classifier made for the data, or None where there is none.

    Nothing is downloaded. Raises UserError for another name, an encoder that cannot take the images, and LPIPS without
    its package or its weights.
    """
    if name in INSTALLED:
        return _lpips(name)
    chosen = OF_DATA.get(spec.name) if name is None else name
    if chosen is None:
        return None
    if chosen not in SHIPPED and not Path(chosen.rpartition(":")[2]).exists():
        known = ", ".join(CHOICES)
        raise UserError(
            f"features is {name!r}; allowed: {known}, an encoder's run, file or folder (dinov2:FOLDER, clip:FOLDER), "
            "or none for the data set's own"
        )
    extractor = named_extractor(chosen)
    maps = EncoderMaps(extractor.encoder, extractor.sha256)
    try:
        maps(torch.zeros(1, *spec.shape))
    except UserError:
        if name is None:
            return None
        raise
    return maps


def lpips_installed() -> bool:
    """Whether the package and its backbone's weights are here."""
    return importlib.util.find_spec("lpips") is not None and _vgg_file().is_file()


def _vgg_file() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE


def _lpips(name: str) -> nn.Module:
    try:
        import lpips
    except ImportError as error:
        raise UserError(
            f"features is {name!r}, which needs a package: pip install lpips torchvision ({error})"
        ) from None
    weights = _vgg_file()
    if not weights.is_file():
        raise UserError(
            f"features is {name!r}, which needs the file {weights}; fetch it once with: "
            "python -c \"import torchvision; torchvision.models.vgg16(weights='IMAGENET1K_V1')\""
        )
    network = lpips.LPIPS(net="vgg", verbose=False)
    if name == "lpips-average":
        _average_pooling(network)
    if name == "vgg":
        return Backbone(network)
    return LPIPS(network, side=64, corners=True) if name == "lpips-64" else LPIPS(network)


def _average_pooling(module: nn.Module) -> None:
    """Put means in the place of all maxima."""
    for name, child in module.named_children():
        if isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
        else:
            _average_pooling(child)
