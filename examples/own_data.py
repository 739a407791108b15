"""Your own pictures: from a folder of files to a one-step generator. About two minutes on one core.

    python examples/own_data.py [--short] [--pictures FOLDER] [--out FOLDER]

Without --pictures some are made (examples/make_photos.py). Lengths are those of a look, not of a good model: what
docs/own_pictures.md does with patience.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from typed import typed


def main() -> None:
    """Convert, train, distil, draw, compare."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--short", action="store_true", help="a few steps of everything, in seconds")
    options.add_argument("--pictures", type=Path)
    options.add_argument("--out", type=Path, default=Path("runs/own-data"))
    given = options.parse_args()
    out, pictures = given.out, given.pictures
    out.mkdir(parents=True, exist_ok=True)
    if pictures is None:
        pictures = out / "photos"
        number = "8" if given.short else "48"
        subprocess.run((sys.executable, Path(__file__).with_name("make_photos.py"), pictures, number), check=True)
    side, width, images = (8, 8, 32) if given.short else (16, 16, 4000)
    look = "--sampler.num-steps 2" if given.short else "--sampler.num-steps 12"

    typed(f"data convert {pictures} {out}/set.zip --resolution {side} --fit crop --holdout 0.1")
    typed(f"data info {out}/set.zip")
    size = f"--data.resolution {side} --network.model-channels {width} --network.attn-resolutions 4"
    length = f"--training.batch 16 --training.total-images {images}"
    typed(f"train edm-emoji64-16 --data.source {out}/set.zip {size} {length} {look} --out {out}/teacher --resume")
    typed(f"distill {out}/teacher --training.total-images {images // 2} --out {out}/student --resume")
    typed(f"sample {out}/teacher --n 16 --steps {2 if given.short else 12} --out {out}/drawn-by-teacher")
    typed(f"sample {out}/student --n 16 --out {out}/drawn-by-student")
    print(f"\nLook at {out}/drawn-by-teacher/grid.png and {out}/drawn-by-student/grid.png")


if __name__ == "__main__":
    main()
