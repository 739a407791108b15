"""Miniature claims of the papers, one file each: `imagewright bench claims KEY`."""

from importlib import import_module

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, Rows

KEYS: tuple[str, ...] = (
    "edm",
    "restart",
    "autoguidance",
    "sims",
    "lcsc",
    "skip_tuning",
    "bespoke",
    "autodiffusion",
    "disco_diff",
    "consistency",
    "ict",
    "multistep_consistency",
    "ctm",
    "scm",
    "vct",
    "dsno",
    "align_your_flow",
    "guided_distillation",
    "dmd",
    "dmd2",
    "uni_instruct",
    "multi_student",
    "em_distillation",
    "score_of_mixture",
    "ddo",
    "rectified_flow_pp",
    "simple_reflow",
    "slimflow",
    "caf",
    "va_vae",
    "lightning_dit",
    "axial_transformer",
    "sparse_transformer",
    "routing_transformer",
    "perceiver_ar",
    "arpg",
    "maskgit",
    "md4",
    "analog_bits",
    "downsampled_imagenet",
    "vcmamba",
    "event_pretraining",
    "metaclip2",
    "data_free_quantization",
    "vatt",
)
"""Files of this folder, in the order of the ledger."""


def load_claim(key: str) -> Claim:
    """The claim of a key (its file is imported only now)."""
    claim = import_module(f"imagewright.bench.claims.{key}").CLAIM
    assert isinstance(claim, Claim)
    return claim


__all__ = ["KEYS", "Budget", "Check", "Claim", "Row", "Rows", "load_claim"]
