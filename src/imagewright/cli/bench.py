"""`imagewright bench speed | claims | orders | updates | decoding`: ratios of speed, claims, errors of samplers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from imagewright.bench.claims import KEYS, load_claim
from imagewright.bench.claims.claim import DEFAULT_SEEDS
from imagewright.bench.claims.ledger import read_records, write_ledger
from imagewright.bench.claims.rearranging import rearrange
from imagewright.bench.claims.runner import check_seeds, run_claim
from imagewright.bench.claims.verdict import LEAST_SEEDS
from imagewright.bench.decoding import measure_cache, measure_masked_decoding, measure_parallel_decoding
from imagewright.bench.encoded import measure_encoded
from imagewright.bench.flows import measure_pairs, measure_student
from imagewright.bench.integers import measure_integers
from imagewright.bench.latents import measure_latents
from imagewright.bench.orders import draw_orders, measure_orders
from imagewright.bench.speed import (
    Ratio,
    measure_loop,
    measure_sampling,
    measure_tangent,
    measure_training,
    measure_trajectory,
)
from imagewright.bench.transformers import measure_transformer
from imagewright.bench.updates import measure_updates
from imagewright.cli.bench_decoding import decoding
from imagewright.cli.command import dispatch
from imagewright.cli.console import OUT, bar, say, table
from imagewright.cli.train import find_experiment
from imagewright.files import write_json
from imagewright.training.distributed import pick_device
from imagewright.types import UserError
from imagewright.version import versions

HELP = """imagewright bench speed [--only pairs student] [--rounds 9] [--device auto] [--out speed.json]
imagewright bench claims KEY ... | --all [--seeds 10000 10001 ...] [--fresh] [--out docs/claims]
imagewright bench claims --all --seeds 10005 10006 ... --out again --compare docs/claims --at-most 60
imagewright bench claims KEY ... | --all --rearranged
imagewright bench claims --list | --ledger
imagewright bench orders [--out orders.png]
imagewright bench updates RECIPE ... [--against RECIPE] [--out updates.json]
imagewright bench decoding [--tokens 256 1024] [--out growth.json]

speed   ratios within one process: one-step sampling, training step, sCM's tangent, DSNO's call, raster decoding with
        its cache, masked and parallel decoding, pairs, small students, discrete latents, a transformer and 8-bit
        products, each against a peer or bound
claims  a paper's claim as a small comparison that can fail, seed by seed; interrupted runs go on where they stopped
updates seconds that one update of a recipe's model takes, with all that it takes of other networks, against a recipe
decoding
        how training and decoding of causal networks grow with the tokens: dense, sparse, routing, axial, Perceiver AR;
        and what raster order, MaskGIT, MD4 and ARPG take to draw an image: passes, seconds, memory
orders  error of every deterministic sampler against network calls, on a mixture whose flow is known exactly
"""


MEASURES: Mapping[str, Callable[..., Ratio | Sequence[Ratio]]] = {
    "sampling": measure_sampling,
    "training": measure_training,
    "loop": measure_loop,
    "tangent": measure_tangent,
    "trajectory": measure_trajectory,
    "cache": measure_cache,
    "masked": measure_masked_decoding,
    "parallel": measure_parallel_decoding,
    "pairs": measure_pairs,
    "student": measure_student,
    "latents": measure_latents,
    "encoded": measure_encoded,
    "transformer": measure_transformer,
    "integers": measure_integers,
}


def speed(rounds: int = 9, device: str = "auto", only: tuple[str, ...] = (), out: Path | None = None) -> None:
    """One-step sampling against the bare network, a training step against diffusers' UNet2DModel and a bare loop, sCM's
    tangent against a forward pass, DSNO's call against a single one, the decoding of tokens (raster order with and
    without a cache, eight masked passes against raster order, ARPG's sixteen against others), pairs stored against the
    bare sampler, a small flow's call against its teacher's, a call that is told discrete latents against its network's,
    an autoencoder's latents read from disk against their pictures decoded, LightningDiT's forward pass against torch's
    transformer, and quantized networks' 8-bit products against the float networks' (on a CPU).

    Both sides of a ratio alternate within one process; medians and the range of the paired ratios are shown.

    Args:
        rounds: measurements of each side.
        device: auto, cpu, cuda, mps.
        only: some of sampling, training, loop, tangent, trajectory, cache, masked, parallel, pairs, student, latents,
            encoded, transformer, integers; default all, integers on a CPU alone.
        out: also write the figures as JSON.
    """
    for name in only:
        if name not in MEASURES:
            raise UserError(f"--only is {name!r}; allowed: {', '.join(MEASURES)}")
    target = pick_device(device)
    names = only or tuple(name for name in MEASURES if name != "integers" or target.type == "cpu")
    command = f"imagewright bench speed --rounds {rounds} --device {device}{' --only ' if only else ''}{' '.join(only)}"
    record = {"format": "imagewright-speed/1", "command": command, "device": str(target), "versions": versions()}
    results: list[Ratio] = []
    for number, name in enumerate(names, 1):
        say(f"measuring {name} ({number} of {len(names)})")
        found = MEASURES[name](target, rounds)
        results += [found] if isinstance(found, Ratio) else found
        if out is not None:  # after each: an interruption loses one
            write_json(out, {**record, "measured": names[:number], "results": [r.as_dict() for r in results]})
    _show_ratios(results)
    if out is not None:
        say(f"written to {out}")


def _show_ratios(results: Sequence[Ratio]) -> None:
    rows = table("what", "ours (images/s)", "against", "its images/s", "ratio", "range")
    for r in results:
        rows.add_row(
            r.what,
            f"{r.ours:.1f}",
            r.peer,
            f"{r.theirs:.1f}" if r.theirs else "not installed",
            f"{r.ratio:.3f}" if r.theirs else "",
            f"{r.low:.3f} to {r.high:.3f}" if r.theirs else "",
        )
    OUT.print(rows)
    for r in results:
        if r.details:
            say(f"{r.what}: " + ", ".join(f"{name} {value:.4g}" for name, value in r.details.items()))


def claims(
    keys: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    seeds: tuple[int, ...] = DEFAULT_SEEDS,
    out: Path = Path("docs/claims"),
    fresh: bool = False,
    all: bool = False,
    compare: Path | None = None,
    at_most: float | None = None,
    smoke: bool = False,
    rearranged: bool = False,
    list: bool = False,
    ledger: bool = False,
) -> None:
    """Measure claims and keep one JSON record each.

    Args:
        keys: which claims; --list shows them.
        seeds: what to measure on, from 10000 on; fewer than five decide nothing. Seeds that the record holds are not
            measured again. Seeds below 1000 are for choosing settings: they are measured, shown and not recorded.
        out: folder of the records.
        fresh: measure anew what the records hold; each keeps what it has until all seeds are measured.
        all: measure all claims.
        compare: folder of earlier records; says whose verdict has changed.
        at_most: only claims that took no more CPU seconds a seed, by the records in --compare, or else in --out.
        smoke: the same code on a fraction of the work; records nothing.
        rearranged: measure nothing; note in records that their claims' files were rearranged since, if both codes
            rehearse alike. It takes a repository whose files are committed.
        list: show all claims and the verdicts in --out.
        ledger: write claims.md and its figures from the records, beside --out.
    """
    for key in keys:
        if key not in KEYS:
            raise UserError(f"there is no claim {key!r}; allowed: {', '.join(KEYS)}")
    if keys and all:
        raise UserError("--all measures every claim; leave out the names")
    if not (keys or all or list or ledger):
        raise UserError("name at least one claim, or give --all, --list or --ledger")
    check_seeds(seeds)
    earlier = read_records(compare or out, KEYS)
    if all:
        keys = KEYS
    if at_most is not None:
        keys = _affordable(keys, earlier, at_most)
    if rearranged:
        for key in earlier if all else keys:
            noted = rearrange(key, out / f"{key}.json")
            say(f"{key}: " + ("rearranged, the rehearsals are equal" if noted else "the record's own code"))
        keys = ()
    for key in keys:
        record = _run(key, seeds, out, fresh, smoke)
        if compare is not None and key in earlier and not smoke:
            before = earlier[key]["verdict"]
            say(f"{key}: " + (f"{before}, again" if before == record["verdict"] else f"CHANGED, was: {before}"))
    if ledger:
        missing = write_ledger(out, out.parent / "claims.md", KEYS)
        say(f"written to {out.parent / 'claims.md'}" + (f"; no record yet: {', '.join(missing)}" if missing else ""))
    if list:
        _show_all(out)


def orders(out: Path = Path("orders.png")) -> None:
    """Draw error against network calls for every deterministic sampler.

    Args:
        out: the picture.
    """
    points = measure_orders()
    draw_orders(points, out)
    rows = table("sampler", "calls", "RMS error")
    for point in points:
        rows.add_row(point.sampler, str(point.calls), f"{point.error:.3g}")
    OUT.print(rows)
    say(f"written to {out}")


def updates(
    recipes: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    against: str = "cd-emoji64-32",
    batch: int = 16,
    rounds: int = 5,
    device: str = "auto",
    out: Path | None = None,
) -> None:
    """What one update of a recipe's model costs, with all that it takes of other networks, against another recipe's.

    Both sides of a ratio alternate within one process; medians and the range of the paired ratios are shown. "to its
    passes" is the ratio to the same passes through the networks alone.

    Args:
        recipes: names of recipes, whose data and teachers must be there.
        against: the recipe whose update counts 1.
        batch: images of an update, for all.
        rounds: measurements of each side.
        device: auto, cpu, cuda, mps.
        out: also write the figures as JSON.
    """
    if batch < 2:
        raise UserError(f"--batch is {batch}; some methods need at least 2 images")
    target = pick_device(device)
    experiments = {name: find_experiment(name) for name in dict.fromkeys((against, *recipes))}
    costs = measure_updates(experiments, against, target, rounds, batch, lambda name: say(f"measuring {name}"))
    rows = table("recipe", "seconds", "ratio", "range", "to its passes", "learning", "frozen", "optimiser steps")
    for c in costs:
        steps = ", ".join(f"{part} {count}" for part, count in c.updates.items())
        sizes = (f"{c.learning / 1e6:.2f} M", f"{c.frozen / 1e6:.2f} M")
        ratios = (f"{c.ratio:.2f}", f"{c.low:.2f} to {c.high:.2f}", f"{c.passes:.2f}")
        rows.add_row(c.recipe, f"{c.seconds:.3g}", *ratios, *sizes, steps)
    OUT.print(rows)
    if out is not None:
        record = {
            "format": "imagewright-updates/1",
            "command": f"imagewright bench updates {' '.join(recipes)} --against {against} --batch {batch} "
            f"--rounds {rounds} --device {device}",
            "device": str(target),
            "versions": versions(),
            "results": [c.as_dict() for c in costs],
        }
        write_json(out, record)
        say(f"written to {out}")


def _affordable(keys: tuple[str, ...], earlier: Mapping[str, Any], at_most: float) -> tuple[str, ...]:
    seconds = {
        key: max(entry["cpu_seconds"] for entry in earlier[key]["seeds"].values()) for key in keys if key in earlier
    }
    chosen = tuple(key for key in keys if seconds.get(key, math.inf) <= at_most)
    for key in keys:
        if key not in chosen:
            say(
                f"left out: {key}, "
                + (f"{seconds[key]:.0f} CPU seconds a seed" if key in seconds else "without a record")
            )
    return chosen


def _run(key: str, seeds: Sequence[int], out: Path, fresh: bool, smoke: bool) -> dict[str, Any]:
    with bar(key, len(seeds), "seeds") as advance_to:
        record = run_claim(
            load_claim(key),
            seeds,
            out / f"{key}.json",
            budget="smoke" if smoke else "full",
            fresh=fresh,
            on_seed=lambda done, total: advance_to(done, total=total),
        )
    rows = table("", f"{record['measure']} ({record['better']} is better)", "spread", str(record["cost"]))
    for row in record["summary"]:
        spread = "" if row["std"] is None else f"{row['least']:.4g} to {row['most']:.4g}"
        rows.add_row(row["name"], f"{row['mean']:.4g}", spread, f"{row['cost']:g}")
    OUT.print(rows)
    for check in record["checks"]:
        bounds = "" if check["interval"] is None else " ({:.3g} to {:.3g})".format(*check["interval"])
        say(f"{check['verdict']}: {check['says']}: {check['mean']:.3g}{bounds}, margin {check['margin']:g}")
    few = f" (it takes at least {LEAST_SEEDS} seeds)" if len(record["seeds"]) < LEAST_SEEDS else ""
    say("smoke run: the figures show nothing" if smoke else f"{record['verdict']}{few}")
    if not smoke and not check_seeds(seeds):
        say("tuning seeds: nothing is recorded")
    return record


def _show_all(folder: Path) -> None:
    rows = table("claim", "paper", "verdict", "miniature")
    records = read_records(folder, KEYS)
    for key in KEYS:
        claim = load_claim(key)
        rows.add_row(key, claim.paper, records[key]["verdict"] if key in records else "not run", claim.miniature)
    OUT.print(rows)


COMMANDS: Mapping[str, Callable[..., None]] = {
    "speed": speed,
    "claims": claims,
    "orders": orders,
    "updates": updates,
    "decoding": decoding,
}


def main(args: Sequence[str]) -> None:
    """Dispatch to the benchmark."""
    dispatch(COMMANDS, args, "imagewright bench", HELP)
