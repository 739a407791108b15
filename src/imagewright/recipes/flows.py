"""Flows on the straight path: flow matching (Lipman et al. 2023; Liu et al. 2023), and what reflow makes of a teacher's
pairs (`imagewright couple`, docs/flows.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from imagewright.methods.caf import ADVERSARY, ConstantAcceleration, InitialVelocityLearning
from imagewright.methods.flow_matching import FlowMatching
from imagewright.methods.rectified_flow_pp import RectifiedFlowPlusPlus
from imagewright.methods.simple_reflow import SimpleReflow
from imagewright.methods.slimflow import LAST, AnnealingReflow, FlowGuidedDistillation
from imagewright.networks import ADMUNetConfig, DhariwalUNetConfig, SongUNetConfig
from imagewright.recipes import edm
from imagewright.recipes.published import halflife_images
from imagewright.samplers import Accelerated, Straight
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.experiment import Experiment

NINE_CALLS = Straight(num_steps=5, order=2, r=0.4, grid="sigmoid")
"""How Simple ReFlow draws."""
ONE_STEP = Straight(times=(LAST,), order=1)
"""How SlimFlow draws."""


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
    return replace(run, training=replace(run.training, micro_batch=64, channels_last=True, precision="fp16"))


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
    run = replace(run, training=replace(run.training, micro_batch=64, channels_last=True, precision="bf16"))
    return _with_real_pairs(run, "imagenet64", 1 / 3)


def slimflow_digits() -> Experiment:
    """SlimFlow's first stage on digits: a flow of a quarter of the parameters of `runs/edm-digits`, from its pairs."""
    run = edm.digits()
    return _slim(run, "digits", replace(run.network, model_channels=16), 60_000)


def slimflow_digits_distil() -> Experiment:
    """SlimFlow's second stage: `runs/slimflow-digits` to one step, about two minutes on two cores."""
    return _distilled(slimflow_digits(), "runs/slimflow-digits", 30_000, 5e-4)


def slimflow_emoji64_32() -> Experiment:
    """SlimFlow's first stage on emoji at 32x32: a quarter of the shipped denoiser's parameters, from its pairs."""
    run = edm.emoji64_32()
    return _slim(run, "emoji64-32", replace(run.network, model_channels=12), 332_000)


def slimflow_emoji64_32_distil() -> Experiment:
    """SlimFlow's second stage: `runs/slimflow-emoji64-32` to one step."""
    return _distilled(slimflow_emoji64_32(), "runs/slimflow-emoji64-32", 60_000, 2e-4)


def slimflow_cifar10() -> Experiment:
    """CIFAR-10, unconditional, as published: 15.7 M parameters, 100,000 pairs of EDM's, 1,300,000 steps of 128."""
    network = SongUNetConfig(
        **edm.FROM_DATA, model_channels=96, channel_mult=(1, 2, 2), num_blocks=2, attn_resolutions=(16,), dropout=0.15
    )
    return _slim_published("cifar10", network, "runs/edm-cifar10-uncond-ncsnpp")


def slimflow_cifar10_distil() -> Experiment:
    """The one-step model of it, as published: LPIPS, the flow's two steps, at most 1,300,000 steps of 128."""
    return _slim_distil_published(slimflow_cifar10(), "runs/slimflow-cifar10", 0.15)


def slimflow_imagenet64() -> Experiment:
    """ImageNet-64 as published: 80.7 M parameters, pairs of EDM's, 1,300,000 steps of 128."""
    network = DhariwalUNetConfig(
        **edm.FROM_DATA, model_channels=128, channel_mult=(1, 2, 2, 4), num_blocks=2, attn_resolutions=(32, 16),
        dropout=0.13,
    )  # fmt: skip
    return _slim_published("imagenet64", network, "runs/edm-imagenet64")


def slimflow_imagenet64_distil() -> Experiment:
    """The one-step model of it, as published."""
    return _slim_distil_published(slimflow_imagenet64(), "runs/slimflow-imagenet64", 0.13)


def caf_digits_velocity() -> Experiment:
    """Constant acceleration flow of digits, first stage: initial velocities of the pairs of `runs/edm-digits`."""
    return _caf(edm.digits(), "digits", InitialVelocityLearning(), 60_000)


def caf_digits() -> Experiment:
    """Second stage: accelerations, on the velocities of `runs/caf-digits-velocity`: two calls an image."""
    return _accelerated(caf_digits_velocity(), ConstantAcceleration(), "runs/caf-digits-velocity")


def caf_digits_gan() -> Experiment:
    """Third stage: `runs/caf-digits` with a convolutional adversary and real images."""
    return _against(caf_digits(), "runs/caf-digits", 20_000, 1e-4)


def caf_emoji64_32_velocity() -> Experiment:
    """Constant acceleration flow of emoji at 32x32, first stage, on the pairs of the shipped denoiser."""
    return _caf(edm.emoji64_32(), "emoji64-32", InitialVelocityLearning(), 332_000)


def caf_emoji64_32() -> Experiment:
    """Second stage, on `runs/caf-emoji64-32-velocity`."""
    return _accelerated(caf_emoji64_32_velocity(), ConstantAcceleration(), "runs/caf-emoji64-32-velocity")


def caf_emoji64_32_gan() -> Experiment:
    """Third stage: `runs/caf-emoji64-32` with a convolutional adversary and real images."""
    return _against(caf_emoji64_32(), "runs/caf-emoji64-32", 60_000, 5e-5)


def caf_cifar10_velocity() -> Experiment:
    """CIFAR-10, unconditional, as published: 1,000,000 pairs of 35 calls, 250,000 steps of 8 x 160, LPIPS, fp16."""
    return _caf_published("cifar10", 8 * 160, (16, 8, 4), "runs/edm-cifar10-uncond-ncsnpp")


def caf_cifar10() -> Experiment:
    """Second stage as published, on `runs/caf-cifar10-velocity`."""
    return _accelerated(caf_cifar10_velocity(), ConstantAcceleration(), "runs/caf-cifar10-velocity")


def caf_cifar10_gan() -> Experiment:
    """Third stage as published, on `runs/caf-cifar10`: 200,000 steps of 8 x 160."""
    return _against(caf_cifar10(), "runs/caf-cifar10", 200_000 * 8 * 160, 2e-5)


def caf_imagenet64_velocity() -> Experiment:
    """ImageNet-64 as published: 3,000,000 pairs of 79 calls, 250,000 steps of 8 x 400, LPIPS, fp16."""
    return _caf_published("imagenet64", 8 * 400, (32, 16, 8), "runs/edm-imagenet64")


def caf_imagenet64() -> Experiment:
    """Second stage as published, on `runs/caf-imagenet64-velocity`."""
    return _accelerated(caf_imagenet64_velocity(), ConstantAcceleration(), "runs/caf-imagenet64-velocity")


def caf_imagenet64_gan() -> Experiment:
    """Third stage as published, on `runs/caf-imagenet64`: 200,000 steps of 8 x 400."""
    return _against(caf_imagenet64(), "runs/caf-imagenet64", 200_000 * 8 * 400, 2e-5)


def _caf(run: Experiment, name: str, method: Any, images: int) -> Experiment:
    """A stage from fresh weights, with the pace of the denoiser's own recipe."""
    return replace(
        run,
        data=replace(run.data, couplings=f"couplings/{name}"),
        method=method,
        sampler=Straight(num_steps=9),
        training=replace(run.training, total_images=images),
    )


def _accelerated(first: Experiment, method: Any, velocity: str) -> Experiment:
    return replace(first, method=method, given={**first.given, "velocity": velocity}, sampler=Accelerated())


def _against(second: Experiment, start: str, images: int, lr: float) -> Experiment:
    """The third stage: from the second's weights, at a constant rate, without a distance of images."""
    optimizer = replace(second.training.optimizer, lr=lr, lr_ramp_images=0, lr_decay_images=None, lr_cooldown_images=0)
    method = ConstantAcceleration(image=None, intervals=10, adversarial=ADVERSARY)
    given = {name: where for name, where in second.given.items() if name != "features"}
    training = replace(second.training, total_images=images, optimizer=optimizer)
    return replace(second, method=method, given=given, start=start, training=training)


def _caf_published(name: str, batch: int, attention: tuple[int, ...], teacher: str) -> Experiment:
    """Published by a program whose 1,000,000 steps are of a quarter of a batch, on eight processes."""
    run = _published(name, teacher, InitialVelocityLearning(), batch, 250_000, 1e-4, 0)
    optimizer = replace(run.training.optimizer, kind="adamw", weight_decay=1e-5)
    network = ADMUNetConfig(
        **edm.FROM_DATA, model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=attention,
        dropout=0.1,
    )  # fmt: skip
    return replace(
        run,
        network=network,
        given={"features": "lpips-average"},
        sampler=Straight(num_steps=9),
        training=replace(
            run.training, micro_batch=batch // 32, channels_last=True, precision="fp16", optimizer=optimizer
        ),
    )


def _slim(run: Experiment, name: str, network: Any, images: int) -> Experiment:
    """The first stage: from fresh weights, with the pace of the denoiser's own recipe."""
    return replace(
        run,
        data=replace(run.data, couplings=f"couplings/{name}"),
        method=AnnealingReflow(),
        network=network,
        sampler=ONE_STEP,
        training=replace(run.training, total_images=images),
    )


def _distilled(run: Experiment, flow: str, images: int, lr: float) -> Experiment:
    training = _tuning(run.training, images, lr)
    method = FlowGuidedDistillation()
    return replace(run, method=method, network=None, given={"flow": flow}, training=training)


def _slim_published(name: str, network: Any, teacher: str) -> Experiment:
    batch = 128
    run = _published(name, teacher, AnnealingReflow(), batch, 1_300_000, 2e-4, 5_000)
    optimizer = replace(run.training.optimizer, clip_norm=1.0)
    # min(0.999999, (1 + n) / (10 + n)) at step n: the ramp lasts longer than the run.
    ema = EmaConfig(halflife_images=halflife_images(batch, 0.999999), rampup_ratio=math.log(2) / 9)
    return replace(
        run,
        data=replace(run.data, xflip=True),
        method=AnnealingReflow(anneal_images=300_000 * batch),
        network=network,
        given={},
        sampler=ONE_STEP,
        training=replace(run.training, optimizer=optimizer, ema=ema),
    )


def _slim_distil_published(run: Experiment, flow: str, dropout: float) -> Experiment:
    optimizer = replace(run.training.optimizer, lr_ramp_images=0)
    return replace(
        run,
        data=replace(run.data, xflip=False),
        method=FlowGuidedDistillation(dropout=dropout),
        network=None,
        given={"flow": flow, "features": "lpips-64"},
        training=replace(run.training, optimizer=optimizer),
    )


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
    "slimflow-digits": slimflow_digits,
    "slimflow-digits-distil": slimflow_digits_distil,
    "slimflow-emoji64-32": slimflow_emoji64_32,
    "slimflow-emoji64-32-distil": slimflow_emoji64_32_distil,
    "slimflow-cifar10": slimflow_cifar10,
    "slimflow-cifar10-distil": slimflow_cifar10_distil,
    "slimflow-imagenet64": slimflow_imagenet64,
    "slimflow-imagenet64-distil": slimflow_imagenet64_distil,
    "caf-digits-velocity": caf_digits_velocity,
    "caf-digits": caf_digits,
    "caf-digits-gan": caf_digits_gan,
    "caf-emoji64-32-velocity": caf_emoji64_32_velocity,
    "caf-emoji64-32": caf_emoji64_32,
    "caf-emoji64-32-gan": caf_emoji64_32_gan,
    "caf-cifar10-velocity": caf_cifar10_velocity,
    "caf-cifar10": caf_cifar10,
    "caf-cifar10-gan": caf_cifar10_gan,
    "caf-imagenet64-velocity": caf_imagenet64_velocity,
    "caf-imagenet64": caf_imagenet64,
    "caf-imagenet64-gan": caf_imagenet64_gan,
}
