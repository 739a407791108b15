"""Distil a model that somebody else trained: its weights become a model folder, and that a one-step student's teacher.

    python examples/distil_downloaded.py [WEIGHTS] [--data SET] [--short] [--out FOLDER]

WEIGHTS is a file or folder that you downloaded (docs/importing.md says which are read), and --data the images that it
was trained on. Without WEIGHTS a stand-in is made: a denoiser of digits, trained for a look, its weights written as
EDM's own program names them. About a minute and a half on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import save_file
from typed import typed

from imagewright.models.files import load_model


def stand_in(out: Path, images: int, size: str) -> Path:
    """A file of weights under EDM's own names, as a download would be."""
    length = f"--training.total-images {images} --sampler.num-steps 9"
    typed(f"train edm-digits {length} {size} --out {out}/elsewhere --resume")
    state = load_model(out / "elsewhere").model.network.state_dict()
    path = out / "downloaded.safetensors"
    save_file({f"model.{name}": tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def main() -> None:
    """Import, look, distil, compare."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("weights", type=Path, nargs="?")
    options.add_argument("--data", default="digits")
    options.add_argument("--short", action="store_true", help="a few steps of everything, in seconds")
    options.add_argument("--out", type=Path, default=Path("runs/downloaded"))
    given = options.parse_args()
    out, images = given.out, 128 if given.short else 12_000
    out.mkdir(parents=True, exist_ok=True)
    weights = given.weights or stand_in(out, images, "--network.model-channels 8" if given.short else "")

    if not (out / "teacher").exists():
        typed(f"import {weights} --out {out}/teacher")
    typed(
        f"train cd-digits --teacher {out}/teacher --data.source {given.data} --training.total-images {images} "
        f"--out {out}/student --resume"
    )
    few = f"--n {32 if given.short else 500} --no-yardsticks --metrics fd"
    typed(
        f"evaluate {out}/teacher --data {given.data} --steps {2 if given.short else 9} {few} --out {out}/teacher.json"
    )
    typed(f"evaluate {out}/student {few}")
    typed(f"sample {out}/student --n 64 --out {out}/drawn")
    print(f"\nLook at {out}/drawn/grid.png: one call each")


if __name__ == "__main__":
    main()
