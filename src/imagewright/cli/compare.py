"""`imagewright compare A B`: two runs' scores side by side, where they may be, and the reason where they may not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from imagewright.cli.command import run
from imagewright.cli.console import OUT, say, table
from imagewright.metrics.records import read_scores
from imagewright.models.files import has_model, read_model_record
from imagewright.pretrained import folder_of
from imagewright.types import UserError

EPILOG = """examples:
  imagewright evaluate runs/a --seeds 1 2 3 && imagewright evaluate runs/b --seeds 1 2 3
  imagewright compare runs/a runs/b

Compared are scores of each run's present weights; of several seeds, their means.
"""
_CONDITIONS: Mapping[str, str] = {
    "extractor_sha256": "feature extractor",
    "reference": "real images",
    "num_reference": "number of real images",
    "num_images": "number of images",
    "image_shape": "shape of the images",
}
"""What two scores must have in common, and what to call it."""

Group = dict[str, Any]


def compare_command(
    a: Annotated[Path, tyro.conf.Positional], b: Annotated[Path, tyro.conf.Positional], nfe: int | None = None
) -> None:
    """Show two runs' scores side by side; scores that were not measured alike are refused, with the reason.

    Args:
        a: a run folder, or a metrics.json.
        b: another.
        nfe: only scores at so many network calls an image; default those of each at the most calls.
    """
    first, second = (_group(path, nfe) for path in (a, b))
    differences = mismatches(first["report"], second["report"])
    if differences:
        raise UserError(f"the scores of {a} and {b} do not compare: {'; '.join(differences)}")
    names = [s for s in first["scores"] if s in second["scores"] and not s.endswith(("_std", "_stderr"))]
    if not names:
        raise UserError(f"{a} and {b} have no measure in common")
    rows = table("", *names)
    for path, group in ((a, first), (b, second)):
        rows.add_row(f"{path}, {_told(group)}", *(_shown(group["scores"][name]) for name in names))
    rows.add_row("second less first", *(_difference(first["scores"][n], second["scores"][n]) for n in names))
    OUT.print(rows)
    for path, group in ((a, first), (b, second)):
        say(f"{path}: weights {str(group['weights'])[:12]}, {_images(group['seen'])}, {group['nfe']} calls an image")
    if min(len(first["seeds"]), len(second["seeds"])) < 2:
        say("note: of one seed each nothing is known of the spread; measure several with `evaluate --seeds`")


def mismatches(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Why two reports do not compare, one sentence for each reason; none where they do."""
    found = []
    for name, what in _CONDITIONS.items():
        ours, theirs = first.get(name), second.get(name)
        if ours != theirs:
            found.append(f"{what} {_brief(ours)} against {_brief(theirs)}")
    before, after = first.get("settings", {}), second.get("settings", {})
    for measure in sorted(before.keys() & after.keys() - {"yardsticks"}):
        if before[measure] != after[measure]:
            found.append(f"settings of {measure} {before[measure]} against {after[measure]}")
    return found


def _group(path: Path, nfe: int | None) -> Group:
    """The scores of the present weights at the most calls, those of several seeds together."""
    path = folder_of(path)
    file = path / "metrics.json" if path.is_dir() else path
    entries = list(read_scores(file).get("reports", []))
    current = _weights(path)
    kept = [e for e in entries if current is None or e.get("weights_sha256") in (None, current)]
    if entries and not kept:
        raise UserError(f"{path} was measured with other weights than it has now: imagewright evaluate {path}")
    kept = [e for e in kept if nfe is None or e["nfe"] == nfe]
    if not kept:
        at = "" if nfe is None else f" at {nfe} calls"
        raise UserError(
            f"{file} holds no scores of images{at}; models that draw have them: imagewright evaluate {path}"
        )
    last = kept[-1]
    alike = [e for e in kept if _way(e) == _way(last) and not mismatches(e["report"], last["report"])]
    scores: dict[str, list[float]] = {}
    for entry in alike:
        for name, value in entry["report"]["scores"].items():
            scores.setdefault(name, []).append(value)
    return {
        "report": last["report"],
        "scores": scores,
        "seeds": [e["report"].get("seed") for e in alike],
        "weights": last.get("weights_sha256"),
        "seen": last.get("images_seen"),
        "nfe": last["nfe"],
    }


def _weights(path: Path) -> str | None:
    return str(read_model_record(path)["weights_sha256"]) if path.is_dir() and has_model(path) else None


def _way(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return entry.get("sampler"), entry["nfe"], entry.get("classes"), entry.get("weights_sha256")


def _told(group: Group) -> str:
    seeds = group["seeds"]
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"


def _shown(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
    return f"{np.mean(values):.4g}{spread}"


def _difference(first: Sequence[float], second: Sequence[float]) -> str:
    """With its standard error, seeds taken as independent, where both have several."""
    found = f"{np.mean(second) - np.mean(first):+.3g}"
    if min(len(first), len(second)) < 2:
        return found
    error = (np.var(first, ddof=1) / len(first) + np.var(second, ddof=1) / len(second)) ** 0.5
    return f"{found} ± {error:.2g}"


def _images(seen: Any) -> str:
    return "an unknown number of images seen" if seen is None else f"{seen:,} images seen"


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."


COMMANDS: Mapping[str, Callable[..., None]] = {"": compare_command}


def main(args: Sequence[str]) -> None:
    """Parse and compare."""
    run(compare_command, args, "imagewright compare", EPILOG)
