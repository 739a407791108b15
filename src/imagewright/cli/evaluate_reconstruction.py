"""`imagewright evaluate AUTOENCODER | TOKENIZER`: what comes back of held-out pictures, and what order latents have."""

from __future__ import annotations

from typing import Any

from imagewright.cli.console import OUT, bar, say, table
from imagewright.cli.scoring import extractor_for, real_images
from imagewright.data import ImageSet
from imagewright.metrics.reconstruction import measure_reconstruction
from imagewright.models.files import ModelFile
from imagewright.training.distributed import pick_device
from imagewright.types import UserError

BETTER = {"psnr": "higher", "ssim": "higher", "probe": "higher"}
"""Of the other scores lower ones are better."""


def evaluate_reconstruction(
    target: str,
    file: ModelFile,
    data: str | None,
    split: str,
    n: int | None,
    seed: int,
    features: str | None,
    inception: str | None,
    batch_size: int,
    device: str,
) -> dict[str, Any]:
    """The entry of metrics.json. Raises UserError for other pictures, or numbers out of range."""
    if batch_size < 1 or seed < 0:
        raise UserError(f"--batch-size is {batch_size} and --seed {seed}; they must be at least 1 and 0")
    images = real_images(target, data, file.spec, split)
    if n is not None:
        if not 2 <= n <= len(images):
            raise UserError(f"--n is {n}; there are {len(images)} images in split {split}, so it must be 2 to that")
        images = images.subset([i * len(images) // n for i in range(n)])
    place = pick_device(device)
    extractor = extractor_for(images.spec.name if data is None else data, inception, place, features)
    with bar(f"reconstructions of {target}", len(images)) as advance_to:
        found = measure_reconstruction(
            file.model, images, _known(target, data, file, split), extractor, seed=seed, batch_size=batch_size,
            device=place, on_progress=advance_to,
        )  # fmt: skip
    return {"target": target, "report": {**found.as_dict(), "split": split}}


def _known(target: str, data: str | None, file: ModelFile, split: str) -> ImageSet | None:
    """What a probe learns from: the training split, where what is measured is another."""
    return None if split in ("train", "all") else real_images(target, data, file.spec, "train")


def show_reconstruction(entry: dict[str, Any]) -> None:
    """The table on the terminal."""
    report = entry["report"]
    scores = report["scores"]
    rows = table("", *scores)
    rows.add_row(entry["target"], *(f"{value:.2%}" if name == "probe" else f"{value:.4g}" for name, value in
                                    scores.items()))  # fmt: skip
    rows.add_row("(better)", *(BETTER.get(name, "lower") for name in scores), style="dim")
    OUT.print(rows)
    size = " x ".join(map(str, report["latent"]))
    say(f"{report['num_images']} images, split {report['split']}; {size} for each")
    for note in report["notes"]:
        say(f"note: {note}")
