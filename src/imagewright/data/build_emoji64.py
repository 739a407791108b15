"""Build the embedded set `emoji64` from the npm package emoji-datasource-google 16.0.0.

Source: Google's Noto emoji pictures, Apache-2.0; what the set holds is told in docs/data/emoji64.md.

    npm pack emoji-datasource-google@16.0.0
    python -m imagewright.data.build_emoji64 emoji-datasource-google-16.0.0.tgz emoji64.zip [--skin-tones]

The pixels are a function of the package alone; the PNG bytes also depend on the zlib inside Pillow.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagewright.data.edm_zip import file_name, write_entries
from imagewright.data.image_set import held_out
from imagewright.data.pixels import Pixels, decode, with_channels
from imagewright.files import replacing
from imagewright.types import UserError

PACKAGE_SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
LICENCE = "Apache-2.0 (Noto emoji, Google), from npm emoji-datasource-google 16.0.0, composited on white"

# Unicode's groups in Unicode's order. "Component" (five skin-tone swatches) is no class.
CLASSES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One picture of the set. base: code points without skin tone, by which the split is decided."""

    codepoints: str
    base: str
    name: str
    group: str
    subgroup: str
    pixels: Pixels


def build(package: Path, out: Path, *, skin_tones: bool = False) -> int:
    """Write the set and return the number of pictures.

    Order: by code points. Of pictures with identical pixels (France and Saint Martin fly one flag) only the
    first is kept, so that the held-out split holds nothing that was trained on.
    Raises UserError when the package is missing or is not the one whose checksum is known.
    """
    _verify(package)
    kept: dict[bytes, Emoji] = {}
    for emoji in sorted(_read(package, skin_tones), key=lambda e: [int(c, 16) for c in e.codepoints.split("-")]):
        kept.setdefault(emoji.pixels.tobytes(), emoji)
    emojis = list(kept.values())
    meta = {
        "labels": [[file_name(i), CLASSES.index(e.group)] for i, e in enumerate(emojis)],
        "classes": list(CLASSES),
        "subgroups": sorted({e.subgroup for e in emojis}),
        "pictures": {
            file_name(i): {
                "name": e.name,
                "subgroup": e.subgroup,
                "split": "test" if held_out(e.base) else "train",
                "codepoints": e.codepoints,
            }
            for i, e in enumerate(emojis)
        },
        "licence": LICENCE,
    }
    with replacing(out) as aside:
        return write_entries(aside, (e.pixels for e in emojis), meta)


def _verify(package: Path) -> None:
    try:
        actual = hashlib.sha256(package.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{package} cannot be read: {error.strerror}") from None
    if actual != PACKAGE_SHA256:
        raise UserError(
            f"{package} has sha256 {actual}, expected {PACKAGE_SHA256}; "
            "get it with: npm pack emoji-datasource-google@16.0.0"
        )


def _read(package: Path, skin_tones: bool) -> Iterator[Emoji]:
    with tarfile.open(package) as archive:

        def member(path: str) -> bytes:
            file = archive.extractfile(f"package/{path}")
            if file is None:
                raise UserError(f"{package} has no file package/{path}")
            return file.read()

        for entry in json.loads(member("emoji.json")):
            if entry["category"] == "Component":
                continue
            variants: list[dict[str, Any]] = [entry]
            if skin_tones:
                variants += entry.get("skin_variations", {}).values()
            for variant in variants:
                if not variant["has_img_google"]:
                    continue
                yield Emoji(
                    codepoints=variant["unified"],
                    base=entry["unified"],
                    name=entry["name"].lower(),
                    group=entry["category"],
                    subgroup=entry["subcategory"],
                    pixels=with_channels(decode(member(f"img/google/64/{variant['image']}")), 3),
                )


def main() -> int:
    """Command line of the builder; 2 and one sentence on bad input."""
    parser = argparse.ArgumentParser(prog="python -m imagewright.data.build_emoji64", description=__doc__)
    parser.add_argument("package", type=Path, help="emoji-datasource-google-16.0.0.tgz")
    parser.add_argument("out", type=Path, help="zip to write")
    parser.add_argument("--skin-tones", action="store_true", help="also the skin-tone variants (near-duplicates)")
    args = parser.parse_args()
    try:
        count = build(args.package, args.out, skin_tones=args.skin_tones)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.out}: {count} pictures, package sha256 {PACKAGE_SHA256} verified")
    print(f"sha256 {hashlib.sha256(args.out.read_bytes()).hexdigest()}, {args.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
