"""Quantization without data (Data-Free Quantization with Accurate Activation Clipping and Adaptive Batch
Normalization, arXiv 2204.04215): the ranges, the norms, and what is trained.

Networks   any `Network` of convolutions and linear layers of torch's; its calls are recorded while its model is asked
           to do what it is for: an encoder to look at made-up pictures (`tuning/synthesis.py`), a generator to draw.
Ranges     of a layer's inputs, the least and greatest that the float network shows on its calls: frozen from then on.
           The paper's quantizer sits behind each ReLU, which is where the next layer's inputs are, and as there the
           network's own input stays as it is. Generators have a range for each bucket of noise levels.
Norms      ABN: batch norms take the statistics of the quantized network's calls, in one pass, so that each sees what
           those before it have mended. "reestimate" (the paper): cumulative averages. "paired" (ours): the stored ones
           moved by what quantizing changed on the same calls. Networks without batch norms, "paired" alone: a gain and
           a bias for each channel of each layer give it the float layer's mean and variance, and are folded into it.
Training   distillation of the rounded weights, norms frozen, straight-through: for classes the cross-entropy of the
           asked class + T^2 KL(float || quantized), T = 20, mean over pictures; for generators the squared error of
           the answers, mean over numbers. Adam.
Departs    no official program is known; what the paper leaves open is from the program of GDFQ (2003.03603) and our
           own. GDFQ's fine-tuning trains a generator of pictures beside, by SGD, and its divergence is a mean over
           classes as well, so that many times weaker; here pictures are made once, directly. Its gradient passes
           clipped numbers, too. Its ranges are running averages of each batch's, corrected twice; here the hull. It
           rounds what the last ReLU says, before it is averaged over places; here the average, the head's input.
Checked    closed forms of both norms; a range is the largest number seen; what is stored answers as what was trained.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.networks.config import Network
from imagewright.networks.quantized import Quantized, Quantizing, layers_of, networks_of, simulate, store
from imagewright.noise import StepNoise
from imagewright.types import Encoding, UserError

Call = tuple[Any, ...]
"""The arguments of one call of a network: tensors of a row for each image, dataclasses of such, others."""
Norms = Literal["none", "reestimate", "paired"]
Loss = Callable[[Any, Any, Tensor], Tensor]
"""(answers, the float network's, rows) -> mean over rows."""
CHUNK = 64
"""Images of a call while ranges are measured."""
ROWS = 256
"""Images in which the statistics of networks without batch norms are compared."""
TEMPERATURE = 20.0
GAIN = 2.0
"""By which a channel is scaled at most."""


# --- calls --------------------------------------------------------------------------------------------------


def recorded(model: nn.Module, act: Callable[[], object]) -> list[tuple[Network, list[Call]]]:
    """A model's networks that are called while something is done, and with what.

    Raises UserError where none is: it has none, or its networks' parts are asked one by one.
    """
    calls: dict[Network, list[Call]] = {network: [] for network in networks_of(model)}

    def note(network: nn.Module, args: Call) -> None:
        calls[cast(Network, network)].append(_each([args], lambda tensors: tensors[0].detach().clone()))

    with torch.no_grad():
        _call([network.register_forward_pre_hook(note) for network in calls], act)
    asked = [(network, those) for network, those in calls.items() if those]
    if not asked:
        raise UserError(f"no network of {an(type(model).__name__)} is ever asked as a whole; it cannot be quantized")
    return asked


def of_noise(call: Call, noise: StepNoise) -> Call:
    """A call of pictures that are nothing but noise, as large as a network's inputs are: of variance 1.

    Raises UserError for a call of tokens.
    """
    if not call[0].is_floating_point():
        raise UserError("a network of tokens is shown no noise; give --ranges own")
    return (noise.normal(call[0]), *call[1:])


def joined(calls: Sequence[Call]) -> Call:
    """One call of all rows."""
    return cast(Call, _each(calls, torch.cat))


def rows_of(call: Call, rows: Tensor | slice) -> Call:
    """Some of a call's rows."""
    return cast(Call, _each([call], lambda tensors: tensors[0][rows]))


def _each(values: Sequence[Any], change: Callable[[list[Tensor]], Tensor]) -> Any:
    """Tensors at the same places of several structures, changed into one."""
    first = values[0]
    if isinstance(first, Tensor):
        return change(list(values))
    if isinstance(first, tuple):
        return tuple(_each(parts, change) for parts in zip(*values, strict=True))
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        named = {f.name: _each([getattr(v, f.name) for v in values], change) for f in dataclasses.fields(first)}
        return dataclasses.replace(first, **named)
    return first


def batches(count: int, most: int) -> list[slice]:
    """Rows in parts of about equal size, so that each counts alike and none has too few for statistics."""
    parts = -(-count // most)
    ends = [count * k // parts for k in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


def _chunks(call: Call) -> Iterator[Call]:
    return (rows_of(call, rows) for rows in batches(len(call[0]), CHUNK))


# --- ranges -------------------------------------------------------------------------------------------------


def edges_of(call: Call, buckets: int) -> Tensor | None:
    """Noise labels between buckets of about as many levels each; None where calls have no noise level.

    There are no more buckets than levels.
    """
    label = call[1] if len(call) > 1 else None
    if not isinstance(label, Tensor) or not label.is_floating_point() or label.shape != (len(call[0]),):
        return None
    levels = np.unique(label.cpu().numpy())
    groups = np.array_split(levels, min(buckets, len(levels)))
    middle = [(a[-1] + b[0]) / 2 for a, b in pairwise(groups)]
    return torch.as_tensor(np.array(middle), dtype=label.dtype, device=label.device)


@torch.no_grad()
def measure_ranges(network: Network, call: Call) -> None:
    """Give a simulated network's layers the ranges of their inputs in a call of the float one.

    The first layer of pictures or tokens is left without: its inputs are the network's own.
    """
    first: list[Quantizing] = []

    def note(layer: Quantizing, x: Tensor) -> None:
        if not first and x.ndim > 2:
            first.append(layer)
        if layer not in first:
            _widen(layer, x)

    layers = [layer for _, layer in layers_of(network)]
    for layer in layers:
        layer.low.fill_(torch.inf)
        layer.high.fill_(-torch.inf)
    with _watched(layers, note):
        for some in _chunks(call):
            network(*some)
    for layer in layers:
        _settle(layer)


def _widen(layer: Quantizing, x: Tensor) -> None:
    index = layer.levels.index
    if index is None or len(index) != len(x):
        index = torch.arange(len(layer.low), device=x.device) if index is None else torch.unique(index)
        low, high = (each.expand(len(index)) for each in x.aminmax())
    else:
        low, high = x.flatten(1).aminmax(dim=1)
    layer.low.scatter_reduce_(0, index, low.to(layer.low.dtype), "amin")
    layer.high.scatter_reduce_(0, index, high.to(layer.high.dtype), "amax")


def _settle(layer: Quantizing) -> None:
    """Buckets that saw nothing have the hull of the others; a layer that saw nothing has no range."""
    seen = layer.high >= layer.low
    low, high = (layer.low[seen].amin(), layer.high[seen].amax()) if bool(seen.any()) else (0.0, 0.0)
    layer.low[~seen], layer.high[~seen] = low, high


@contextmanager
def _watched(layers: Sequence[Any], note: Callable[[Quantizing, Tensor], None]) -> Iterator[None]:
    """Let layers tell their inputs, and round nothing meanwhile."""
    for layer in layers:
        layer.watch = note
    try:
        yield
    finally:
        for layer in layers:
            layer.watch = None


# --- norms --------------------------------------------------------------------------------------------------


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """Those that have statistics."""
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]


@torch.no_grad()
def reestimate(network: Network, call: Call) -> None:
    """ABN as the paper has it: statistics of this network's own maps, averaged over chunks of a call."""
    norms = batch_norms(network)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    for some in _chunks(call):
        network(*some)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def pair_norms(network: Network, original: Network, call: Call) -> None:
    """ABN, paired: statistics move by what quantizing changed between two networks in the same call."""
    before = _moments(batch_norms(original), lambda: original(*call), of_inputs=True)
    norms = batch_norms(network)
    told = dict(zip(norms, before, strict=True))

    def mend(norm: nn.Module, args: tuple[Tensor]) -> None:
        mean, var = _stats(args[0], 1)
        old_mean, old_var = told[cast(nn.BatchNorm2d, norm)]
        cast(Tensor, norm.running_mean).add_(mean - old_mean)
        cast(Tensor, norm.running_var).mul_(torch.where(old_var > 0, var / old_var, torch.ones_like(var)))

    handles = [norm.register_forward_pre_hook(mend) for norm in norms]
    _call(handles, lambda: network(*call))


@torch.no_grad()
def pair_layers(network: Network, original: Network, call: Call) -> None:
    """Fold a gain, and a bias where there is one, into each channel, so that layers have the original's moments."""
    layers = [layer for _, layer in layers_of(network)]
    there = [layer for _, layer in layers_of(original)]
    before = _moments(there, lambda: original(*call), of_inputs=False)
    told = dict(zip(layers, before, strict=True))

    def mend(layer: Any, _: Any, answer: Tensor) -> Tensor:
        axis = _axis(layer, answer)
        mean, var = _stats(answer, axis)
        old_mean, old_var = told[layer]
        usable = (var > 0) & (old_var > 0)
        gain = torch.where(usable, (old_var / var).sqrt(), torch.ones_like(var)).clamp(1 / GAIN, GAIN)
        shift = torch.zeros_like(mean) if layer.bias is None else old_mean - gain * mean
        weight = layer._parameters["weight"]
        weight.mul_(gain.view(-1, *(1,) * (weight.ndim - 1)))
        if layer.bias is not None:
            layer.bias.copy_(gain * layer.bias + shift)
        along = [1] * answer.ndim
        along[axis] = -1
        return answer * gain.view(along) + shift.view(along)

    handles = [layer.register_forward_hook(mend) for layer in layers if layer in told]
    _call(handles, lambda: network(*call))


Moments = tuple[Tensor, Tensor]


def _moments(modules: Sequence[nn.Module], act: Callable[[], object], *, of_inputs: bool) -> list[Moments]:
    """Mean and variance of each channel of what modules take or give in a call."""
    found: dict[nn.Module, Moments] = {}

    def note(module: nn.Module, args: tuple[Tensor], answer: Tensor) -> None:
        seen = args[0] if of_inputs else answer
        found[module] = _stats(seen, 1 if of_inputs else _axis(module, seen))

    _call([module.register_forward_hook(note) for module in modules], act)
    nothing = torch.zeros(())
    return [found.get(module, (nothing, nothing)) for module in modules]


def _axis(layer: nn.Module, answer: Tensor) -> int:
    return answer.ndim - 1 if isinstance(layer, nn.Linear) else 1


def _stats(x: Tensor, axis: int) -> Moments:
    """Mean and variance (of the population) over all other axes."""
    over = [a for a in range(x.ndim) if a != axis]
    return x.mean(over), x.var(over, correction=0)


def _call(handles: Sequence[Any], act: Callable[[], object]) -> None:
    try:
        act()
    finally:
        for handle in handles:
            handle.remove()


# --- training -----------------------------------------------------------------------------------------------


def class_loss(labels: Tensor) -> Loss:
    """Of classifiers: the asked class, and what the float network says of it."""

    def loss(answer: Encoding, original: Encoding, rows: Tensor) -> Tensor:
        assert answer.logits is not None and original.logits is not None
        softer, soft = (F.log_softmax(each / TEMPERATURE, 1) for each in (answer.logits, original.logits))
        told = F.kl_div(softer, soft, reduction="batchmean", log_target=True)
        return F.cross_entropy(answer.logits, labels[rows]) + TEMPERATURE**2 * told

    return loss


def answer_loss(answer: Tensor, original: Tensor, rows: Tensor) -> Tensor:
    """Of generators: the squared error, mean over numbers."""
    return (answer - original).square().mean()


def distil(
    network: Network, original: Network, call: Call, loss: Loss, *, updates: int, rate: float, batch: int, seed: int
) -> None:
    """Train a simulated network's weights towards the float one, on rows of a call; norms stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    network.requires_grad_(True)
    optimizer = torch.optim.Adam(list(network.parameters()), lr=rate)
    for _ in range(updates):
        rows = torch.randint(len(call[0]), (batch,), generator=generator).to(call[0].device)
        some = rows_of(call, rows)
        with torch.no_grad():
            target = original(*some)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss(network(*some), target, rows))
        optimizer.step()
    network.requires_grad_(False)


# --- the whole ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """Settings of a quantization. Raises UserError for a value out of range."""

    bits: int = 8
    activation_bits: int = 8
    buckets: int = 8
    norms: Norms = "paired"
    updates: int = 0
    """Of fine-tuning."""
    rate: float = 1e-5
    batch: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        Quantized(bits=self.bits, activation_bits=self.activation_bits, buckets=self.buckets)
        if self.norms not in get_args(Norms):
            raise UserError(f"norms is {self.norms!r}; allowed: {', '.join(get_args(Norms))}")


def require_quantizable(model: nn.Module, config: Quantization) -> None:
    """Raise UserError for a model that `quantize` would refuse, before the calls that it learns from are made."""
    for network in networks_of(model):
        _require_fit(network, config)


def _require_fit(network: Network, config: Quantization) -> None:
    if network.quantized is not None:
        raise UserError("the model is quantized; quantize the one that it was made of")
    if config.norms == "reestimate" and not batch_norms(network):
        raise UserError(f"{an(type(network).__name__)} has no batch norm to re-estimate; give --norms paired, or none")


def quantize(
    network: Network, ranges: Sequence[Call], config: Quantization, *, norms: Sequence[Call] | None = None, loss: Loss
) -> None:
    """Quantize a network in place: `ranges` are the calls that clip and train, `norms` (default: they) those that mend.

    Raises UserError for a network that is quantized or cannot be, and for norms that it has not.
    """
    _require_fit(network, config)
    original, clipping = copy.deepcopy(network), joined(ranges)
    mending = clipping if norms is None else joined(norms)
    has_norms = bool(batch_norms(network))
    edges = edges_of(clipping, config.buckets) if config.activation_bits and config.buckets > 1 else None
    buckets = 1 if edges is None else len(edges) + 1
    simulate(network, Quantized(bits=config.bits, activation_bits=config.activation_bits, buckets=buckets))
    if edges is not None and buckets > 1:
        cast(Any, network).edges.copy_(edges)
    if config.activation_bits:
        measure_ranges(network, clipping)
    if config.norms == "reestimate":
        reestimate(network, mending)
    elif config.norms == "paired" and has_norms:
        pair_norms(network, original, mending)
    elif config.norms == "paired":
        pair_layers(network, original, _some(mending, ROWS))
    if config.updates:
        told = {"updates": config.updates, "rate": config.rate, "batch": config.batch, "seed": config.seed}
        distil(network, original, clipping, loss, **told)  # type: ignore[arg-type]
    store(network)
    network.eval()


def _some(call: Call, most: int) -> Call:
    """Rows of a call, evenly, at most so many."""
    count = len(call[0])
    return call if count <= most else rows_of(call, torch.arange(most, device=call[0].device) * count // most)
