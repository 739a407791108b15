"""Complete runs as functions: paper x data set, with their hyper-parameters. `imagewright train NAME`."""

from collections.abc import Callable

from imagewright.recipes import autoregressive, consistency, edm, improved_consistency, maskgit, uni_instruct
from imagewright.recipes import consistency_trajectory as trajectory
from imagewright.recipes import continuous_consistency as continuous
from imagewright.recipes import distribution_matching as matching
from imagewright.recipes import multistep_consistency as multistep
from imagewright.training.experiment import Experiment

RECIPES: dict[str, Callable[[], Experiment]] = {
    "edm-digits": edm.digits,
    "edm-emoji64-16": edm.emoji64_16,
    "edm-emoji64-32": edm.emoji64_32,
    "edm-cifar10": edm.cifar10,
    "edm-imagenet64": edm.imagenet64,
    "cd-digits": consistency.cd_digits,
    "cd-emoji64-32": consistency.cd_emoji64_32,
    "cd-cifar10": consistency.cd_cifar10,
    "cd-imagenet64": consistency.cd_imagenet64,
    "ct-digits": consistency.ct_digits,
    "ct-cifar10": consistency.ct_cifar10,
    "ct-imagenet64": consistency.ct_imagenet64,
    "ctcd-digits": consistency.ctcd_digits,
    "ctcd-cifar10": consistency.ctcd_cifar10,
    "ctcd-cifar10-stop-gradient": consistency.ctcd_cifar10_stop_gradient,
    "ctct-cifar10": consistency.ctct_cifar10,
    "pd-digits": consistency.pd_digits,
    "pd-cifar10": consistency.pd_cifar10,
    "ict-digits": improved_consistency.digits,
    "ict-cifar10": improved_consistency.cifar10,
    "ict-imagenet64": improved_consistency.imagenet64,
    "mcd-digits": multistep.mcd_digits,
    "mcd-emoji64-32": multistep.mcd_emoji64_32,
    "mcd-imagenet64": multistep.mcd_imagenet64,
    "mct-digits": multistep.mct_digits,
    "mct-imagenet64": multistep.mct_imagenet64,
    "ctm-digits": trajectory.ctm_digits,
    "ctm-emoji64-32": trajectory.ctm_emoji64_32,
    "ctm-cifar10": trajectory.ctm_cifar10,
    "ctm-cifar10-gan": trajectory.ctm_cifar10_gan,
    "ctm-imagenet64": trajectory.ctm_imagenet64,
    "ctm-imagenet64-gan": trajectory.ctm_imagenet64_gan,
    "trigflow-digits": continuous.trigflow_digits,
    "trigflow-cifar10": continuous.trigflow_cifar10,
    "trigflow-imagenet64": continuous.trigflow_imagenet64,
    "scd-digits": continuous.scd_digits,
    "scd-emoji64-32": continuous.scd_emoji64_32,
    "scd-cifar10": continuous.scd_cifar10,
    "scd-imagenet64": continuous.scd_imagenet64,
    "sct-digits": continuous.sct_digits,
    "sct-cifar10": continuous.sct_cifar10,
    "sct-imagenet64": continuous.sct_imagenet64,
    "dmd-digits": matching.dmd_digits,
    "dmd-emoji64-32": matching.dmd_emoji64_32,
    "dmd-cifar10": matching.dmd_cifar10,
    "dmd-imagenet64": matching.dmd_imagenet64,
    "dmd2-digits": matching.dmd2_digits,
    "dmd2-digits-gan": matching.dmd2_digits_gan,
    "dmd2-digits-4-steps": matching.dmd2_digits_4_steps,
    "dmd2-emoji64-32": matching.dmd2_emoji64_32,
    "dmd2-emoji64-32-gan": matching.dmd2_emoji64_32_gan,
    "dmd2-imagenet64": matching.dmd2_imagenet64,
    "dmd2-imagenet64-gan": matching.dmd2_imagenet64_gan,
    "causal-digits": autoregressive.digits,
    "causal-emoji64-16": autoregressive.emoji64_16,
    "causal-emoji64-32": autoregressive.emoji64_32,
    "vq-digits": maskgit.vq_digits,
    "vq-emoji64-32": maskgit.vq_emoji64_32,
    "vq-imagenet64": maskgit.vq_imagenet64,
    "vq-imagenet256": maskgit.vq_imagenet256,
    "maskgit-digits": maskgit.maskgit_digits,
    "maskgit-emoji64-32": maskgit.maskgit_emoji64_32,
    "maskgit-imagenet64": maskgit.maskgit_imagenet64,
    "maskgit-imagenet256": maskgit.maskgit_imagenet256,
    **uni_instruct.FAMILY,
}
"""Every recipe by its name on the command line."""

__all__ = ["RECIPES"]
