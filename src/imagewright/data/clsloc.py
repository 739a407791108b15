"""The 1000 classes of ImageNet in the order of the challenge's development kit (CLS-LOC), by their WordNet ids.

Downsampled ImageNet and the challenge's ground truth count in this order, from 1. EDM, ADM, torchvision and all usual
classifiers count the ids in alphabetical order, from 0. Ids, as two names ("crane", "maillot") occur twice.
"""

from __future__ import annotations

from pathlib import Path

CLSLOC: tuple[str, ...] = tuple((Path(__file__).parent / "assets" / "clsloc.txt").read_text("ascii").split())
"""WordNet ids; class k of downsampled ImageNet, from 1, is CLSLOC[k - 1]."""
ALPHABETICAL: tuple[int, ...] = tuple(map(sorted(CLSLOC).index, CLSLOC))
"""The index in alphabetical order of each class of CLSLOC."""
