"""Flows on the straight path: flow matching (Lipman et al. 2023; Liu et al. 2023), and what reflow makes of a teacher's
pairs (`imagewright couple`, docs/flows.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from imagewright.methods.flow_matching import FlowMatching
from imagewright.recipes import edm
from imagewright.samplers import Straight
from imagewright.training.experiment import Experiment


def flow_digits() -> Experiment:
    """A flow of 8x8 digits from fresh weights, with EDM's network and length: about two minutes on two cores."""
    return _fresh(edm.digits())


def flow_emoji64_32() -> Experiment:
    """A flow of emoji at 32x32 from fresh weights, with EDM's network and length (hours on two cores)."""
    return _fresh(edm.emoji64_32())


def flow_cifar10() -> Experiment:
    """A flow of CIFAR-10, with EDM's network and length; no paper's own recipe."""
    run = edm.cifar10()
    return replace(_fresh(run), network=replace(run.network, augment_dim=0))


def _fresh(run: Experiment) -> Experiment:
    return replace(run, method=FlowMatching(), sampler=Straight(num_steps=9))


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "flow-digits": flow_digits,
    "flow-emoji64-32": flow_emoji64_32,
    "flow-cifar10": flow_cifar10,
}
