"""Flows on the straight path: flow matching (Lipman et al. 2023; Liu et al. 2023), and what reflow makes of a teacher's
pairs (`imagewright couple`, docs/flows.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from imagewright.methods.flow_matching import FlowMatching
from imagewright.methods.rectified_flow_pp import RectifiedFlowPlusPlus
from imagewright.methods.simple_reflow import SimpleReflow
from imagewright.recipes import edm
from imagewright.recipes.published import halflife_images
from imagewright.samplers import Straight
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

NINE_CALLS = Straight(num_steps=5, order=2, r=0.4, grid="sigmoid")
"""How Simple ReFlow draws."""


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


def flow_digits_from_edm() -> Experiment:
    """The flow of the run `runs/edm-digits`, trained on as flow matching."""
    run = replace(flow_digits(), network=None, given={"teacher": "runs/edm-digits"})
    return replace(run, training=_tuning(run.training, 20_000, 5e-4))


def rfpp_digits() -> Experiment:
    """2-rectified flow++ of digits from `runs/edm-digits` and its couplings: about two minutes on two cores."""
    return _reflow("digits", "runs/edm-digits", RectifiedFlowPlusPlus(), 30_000, 5e-4)


def rfpp_emoji64_32() -> Experiment:
    """2-rectified flow++ of emoji at 32x32 from the shipped denoiser and its couplings."""
    return _reflow("emoji64-32", "emoji64-32", RectifiedFlowPlusPlus(), 60_000, 2e-4)


def rfpp_cifar10() -> Experiment:
    """CIFAR-10, unconditional, config F as published: 1,000,000 pairs of 35 calls, LPIPS, 800,000 steps of 512."""
    method = RectifiedFlowPlusPlus(dropout=0.13)
    return _published("cifar10", "runs/edm-cifar10-uncond-ncsnpp", method, 512, 800_000, 2e-4, 5_000)


def rfpp_imagenet64() -> Experiment:
    """ImageNet-64, config E as published: 5,000,000 pairs of 79 calls, LPIPS, 700,000 steps of 2,048, fp16."""
    method = RectifiedFlowPlusPlus(dropout=0.10, over_time=False)
    run = _published("imagenet64", "runs/edm-imagenet64", method, 2048, 700_000, 1e-4, 2_500)
    return replace(run, training=replace(run.training, micro_batch=64, precision="fp16"))


def simple_reflow_digits() -> Experiment:
    """Simple ReFlow of digits from `runs/edm-digits` and its couplings, drawn and inverted: about two minutes."""
    run = _reflow("digits", "runs/edm-digits", SimpleReflow(), 30_000, 5e-4)
    return _with_real_pairs(replace(run, sampler=NINE_CALLS), "digits", 0.2)


def simple_reflow_emoji64_32() -> Experiment:
    """Simple ReFlow of emoji at 32x32 from the shipped denoiser and its couplings, drawn and inverted."""
    run = _reflow("emoji64-32", "emoji64-32", SimpleReflow(), 60_000, 2e-4)
    return _with_real_pairs(replace(run, sampler=NINE_CALLS), "emoji64-32", 0.2)


def simple_reflow_cifar10() -> Experiment:
    """CIFAR-10, unconditional: 1,000,000 pairs drawn and 50,000 inverted, 200,000 steps of 512 (the length is ours)."""
    method = SimpleReflow(dropout=0.03)
    run = _published("cifar10", "runs/edm-cifar10-uncond-ncsnpp", method, 512, 200_000, 2e-4, 5_000)
    return _with_real_pairs(replace(run, given={"teacher": run.given["teacher"]}, sampler=NINE_CALLS), "cifar10", 0.05)


def simple_reflow_imagenet64() -> Experiment:
    """ImageNet-64: 8,000,000 pairs drawn and 4,000,000 inverted, 100,000 steps of 2,048 (the length is ours)."""
    run = _published("imagenet64", "runs/edm-imagenet64", SimpleReflow(dropout=0.025), 2048, 100_000, 1e-4, 2_500)
    run = replace(run, given={"teacher": run.given["teacher"]}, sampler=NINE_CALLS)
    run = replace(run, training=replace(run.training, micro_batch=64, precision="bf16"))
    return _with_real_pairs(run, "imagenet64", 1 / 3)


def _fresh(run: Experiment) -> Experiment:
    return replace(run, method=FlowMatching(), sampler=Straight(num_steps=9))


def _tuning(training: TrainingConfig, images: int, lr: float) -> TrainingConfig:
    """Lengths of a run that starts from trained weights."""
    optimizer = replace(
        training.optimizer, lr=lr, lr_ramp_images=0.02, lr_decay_images=None, lr_cooldown_images=0.4, eps=1e-8
    )
    ema = EmaConfig(halflife_images=0.05, rampup_ratio=0.1)
    return replace(training, total_images=images, optimizer=optimizer, ema=ema, snapshot_images=0.5)


def _reflow(name: str, teacher: str, method: Any, images: int, lr: float) -> Experiment:
    run = edm.digits() if name == "digits" else edm.emoji64_32()
    return replace(
        run,
        data=replace(run.data, couplings=f"couplings/{name}"),
        method=method,
        network=None,
        given={"teacher": teacher},
        sampler=Straight(num_steps=1, order=1, keep_noise=True),
        training=_tuning(run.training, images, lr),
    )


def _with_real_pairs(run: Experiment, name: str, share: float) -> Experiment:
    """Beside the pairs that the teacher drew, those of real images: `imagewright couple ... --invert`."""
    pairs = (f"couplings/{name}", f"couplings/{name}-real")
    return replace(run, data=replace(run.data, couplings=pairs, coupling_weights=(1 - share, share)))


def _published(name: str, teacher: str, method: Any, batch: int, steps: int, lr: float, warm_up: int) -> Experiment:
    """What reflow's published runs share: Adam, an average of decay 0.9999 a step, LPIPS with means for its pools."""
    run = edm.imagenet64() if name == "imagenet64" else edm.cifar10_uncond()
    return Experiment(
        data=replace(run.data, couplings=f"couplings/{name}"),
        method=method,
        given={"teacher": teacher, "features": "lpips-average"},
        sampler=Straight(num_steps=1, order=1, keep_noise=True),
        training=TrainingConfig(
            total_images=batch * steps,
            batch=batch,
            # The program takes the mean itself, so its eps is as it is.
            optimizer=OptimizerConfig(lr=lr, lr_ramp_images=warm_up * batch),
            ema=EmaConfig(halflife_images=halflife_images(batch, 0.9999), rampup_ratio=None),
            log_images=100 * batch,
            snapshot_images=5_000 * batch,
            checkpoint_images=5_000 * batch,
        ),
    )


FAMILY: Mapping[str, Callable[[], Experiment]] = {
    "flow-digits": flow_digits,
    "flow-digits-from-edm": flow_digits_from_edm,
    "flow-emoji64-32": flow_emoji64_32,
    "flow-cifar10": flow_cifar10,
    "rfpp-digits": rfpp_digits,
    "rfpp-emoji64-32": rfpp_emoji64_32,
    "rfpp-cifar10": rfpp_cifar10,
    "rfpp-imagenet64": rfpp_imagenet64,
    "simple-reflow-digits": simple_reflow_digits,
    "simple-reflow-emoji64-32": simple_reflow_emoji64_32,
    "simple-reflow-cifar10": simple_reflow_cifar10,
    "simple-reflow-imagenet64": simple_reflow_imagenet64,
}
