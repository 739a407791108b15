"""Claims: measured seeds are kept, intervals decide, the ledger shows rows and verdicts; smoke runs."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from imagewright.bench.claims import (
    KEYS,
    Budget,
    Check,
    Claim,
    Row,
    Rows,
    load_claim,
    origin,
    plane,
    rearranging,
    rehearsal,
)
from imagewright.bench.claims.claim import DEFAULT_SEEDS, REPORTED_SEEDS, TUNING_SEEDS, by_how_much, how_many_times
from imagewright.bench.claims.ledger import read_records, write_ledger
from imagewright.bench.claims.plane import PointTraining, point_denoiser
from imagewright.bench.claims.plane_training import PointRun, distil, mixture_points
from imagewright.bench.claims.rearranging import rearrange
from imagewright.bench.claims.rings import ring
from imagewright.bench.claims.runner import rows_of, run_claim
from imagewright.bench.claims.verdict import interval, judge, together
from imagewright.cli import bench
from imagewright.cli.main import main
from imagewright.methods.edm import EDM
from imagewright.types import Parts, Trained, UserError

ASKED: list[int] = []
SEEDS = list(DEFAULT_SEEDS)


def measure(seed: int, budget: Budget) -> Sequence[Row]:
    ASKED.append(seed)
    k = seed % 10
    return [
        Row(name="ours", score=1.0 + k, cost=3, curve="line"),
        Row(name="ours, longer", score=0.5 + k, cost=9, curve="line", more={"recall": 0.25}),
        Row(name="theirs", score=4.0 if k < 4 else 3.0, cost=3),
    ]


def claim(*checks: Check) -> Claim:
    return Claim(
        key="toy", paper="2206.00364", headline="1", miniature="A toy.", measure="error", cost="NFE", run=measure,
        checks=checks,
    )  # fmt: skip


OURS_LOWER = Check(says="ours is lower", effect=by_how_much("ours", "theirs"))
LONGER_LOWER = Check(says="longer is lower", effect=by_how_much("ours, longer", "ours"))
HALF = Check(says="longer halves it", effect=how_many_times("ours, longer", "ours"), scale="ratio", margin=2.5)


@pytest.fixture(autouse=True)
def forget() -> None:
    ASKED.clear()


def test_mean_spread_and_effects_by_seed(tmp_path: Path) -> None:
    record = run_claim(claim(OURS_LOWER, LONGER_LOWER), SEEDS, tmp_path / "toy.json")
    first, check = record["summary"][0], record["checks"][0]
    assert (first["mean"], first["least"], first["most"]) == (3.0, 1.0, 5.0)
    assert first["std"] == pytest.approx(2.5**0.5)
    assert list(check["effects"].values()) == [3.0, 2.0, 1.0, 0.0, -2.0]
    # Mean 0.8, standard deviation sqrt(3.7), Student's t quantile of four degrees of freedom 2.776445.
    assert check["mean"] == pytest.approx(0.8)
    assert check["interval"] == pytest.approx([0.8 - 2.3884, 0.8 + 2.3884], abs=1e-3)
    assert [c["verdict"] for c in record["checks"]] == ["undecided", "holds"]
    assert record["verdict"] == "undecided"
    assert json.loads((tmp_path / "toy.json").read_text()) == record


def test_ratios_are_judged_by_their_geometric_mean() -> None:
    mean, low, high = interval([1.0, 4.0], "ratio")
    assert mean == pytest.approx(2.0) and low * high == pytest.approx(4.0) and low < 1 < 4 < high
    assert interval([3.0], "ratio") == (pytest.approx(3.0), 0.0, math.inf)
    for wrong in ([1.0, 0.0], [1.0, -2.0], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="must be finite, and ratios positive"):
            interval(wrong, "ratio")


@pytest.mark.parametrize(
    ("effects", "margin", "verdict"),
    [
        ([0.9, 1.0, 1.1, 1.0, 1.0], 0.5, "holds"),
        ([0.9, 1.0, 1.1, 1.0, 1.0], 1.5, "does not hold"),
        ([0.9, 1.0, 1.1, 1.0, 1.0], 1.0, "undecided"),
        ([-0.9, -1.0, -1.1, -1.0, -1.0], None, "does not hold"),
        ([2.0, 2.0, 2.0, 2.0, 2.0], None, "holds"),
        ([5.0, 5.0, 5.0, 5.1], None, "undecided"),  # four seeds decide nothing
        ([-1.0, 20.0, 1.0, 1.0, 1.0], None, "undecided"),  # nor does a mean that one seed makes
    ],
)
def test_the_interval_decides(effects: list[float], margin: float | None, verdict: str) -> None:
    assert judge(Check(says="", effect=lambda rows: 0.0, margin=margin), effects) == verdict


def test_one_failed_check_fails_a_claim_and_an_open_one_leaves_it_open() -> None:
    assert together(["holds", "holds"]) == "holds"
    assert together(["holds", "undecided"]) == "undecided"
    assert together(["undecided", "does not hold", "holds"]) == "does not hold"
    assert together([]) == "undecided"


def test_measured_seeds_are_kept_and_none_is_lost(tmp_path: Path) -> None:
    out = tmp_path / "toy.json"
    run_claim(claim(LONGER_LOWER), SEEDS[:2], out)
    record = run_claim(claim(LONGER_LOWER), SEEDS[1:], out)
    assert ASKED == SEEDS
    assert list(rows_of(record)) == SEEDS and rows_of(record)[SEEDS[2]].score("ours") == 3.0
    assert record["command"] == "imagewright bench claims toy --seeds " + " ".join(map(str, SEEDS))
    assert all({"cpu_seconds", "machine", "versions", "commit", "code"} <= entry.keys() for entry in
               record["seeds"].values())  # fmt: skip


def test_a_record_is_never_rewritten_without_running(tmp_path: Path) -> None:
    out = tmp_path / "toy.json"
    run_claim(claim(LONGER_LOWER), SEEDS, out)
    before = out.read_bytes(), out.stat().st_mtime_ns
    run_claim(claim(OURS_LOWER), SEEDS, out)
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before
    run_claim(claim(OURS_LOWER), SEEDS[:1], out, fresh=True)
    assert [*SEEDS, SEEDS[0]] == ASKED and list(json.loads(out.read_text())["seeds"]) == [str(SEEDS[0])]


class Killed(BaseException):
    pass


def test_a_fresh_record_takes_the_place_of_a_whole_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "toy.json"
    run_claim(claim(LONGER_LOWER), SEEDS, out)
    before = out.read_bytes()
    ASKED.clear()

    def killed(done: int, total: int) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        run_claim(claim(LONGER_LOWER), SEEDS, out, fresh=True, on_seed=killed)
    assert out.read_bytes() == before
    run_claim(claim(OURS_LOWER), SEEDS, out, fresh=True)
    assert ASKED == SEEDS  # each once: what was measured before the stop is kept
    assert json.loads(out.read_text())["checks"][0]["says"] == "ours is lower"
    assert [path.name for path in tmp_path.iterdir()] == ["toy.json"]


def test_two_runs_on_one_record_lose_no_seed(tmp_path: Path) -> None:
    out = tmp_path / "toy.json"

    def other(done: int, total: int) -> None:
        if done == 1:  # while this run is at its second seed
            run_claim(claim(LONGER_LOWER), SEEDS[3:], out)

    record = run_claim(claim(LONGER_LOWER), SEEDS[:2], out, on_seed=other)
    assert (
        list(record["seeds"]) == list(json.loads(out.read_text())["seeds"]) == [str(s) for s in SEEDS if s != SEEDS[2]]
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("seeds", {}), ("seeds", {"one": {}}), ("summary", [{}]), ("checks", "none"), ("verdict", None), ("cost", 3)],
)
def test_a_damaged_record_is_one_sentence(name: str, value: object, tmp_path: Path) -> None:
    out = tmp_path / "toy.json"
    record = run_claim(claim(LONGER_LOWER), SEEDS[:1], out)
    out.write_text(json.dumps(record | {name: value}))
    for read in (lambda: run_claim(claim(LONGER_LOWER), SEEDS, out), lambda: read_records(tmp_path, ["toy"])):
        with pytest.raises(UserError, match=rf"toy\.json is damaged: .*{name}"):
            read()
    out.write_text("[]")
    assert read_records(tmp_path, ["toy"]) == {}


def test_rows_of_other_code_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "toy.json"
    run_claim(claim(LONGER_LOWER), SEEDS[:1], out)
    monkeypatch.setattr(origin, "code_hash", lambda key: "other")
    with pytest.raises(UserError, match=r"other code of claim 'toy'; --fresh measures it anew"):
        run_claim(claim(LONGER_LOWER), SEEDS, out)


def test_the_hash_covers_what_a_claim_builds_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("from imagewright.bench.claims.shared import f\n")
    (tmp_path / "shared.py").write_text("from imagewright.bench.claims.claim import Row\nf = 1\n")
    (tmp_path / "claim.py").write_text("1\n")
    monkeypatch.setattr(origin, "FOLDER", tmp_path)
    first = origin.code_hash("mine")
    (tmp_path / "claim.py").write_text("2\n")
    assert origin.code_hash("mine") == first
    (tmp_path / "shared.py").write_text("f = 2\n")
    assert origin.code_hash("mine") != first


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose one claim "toy" is committed, measured, and then changed and committed again."""
    folder = tmp_path / "src" / "imagewright" / "bench" / "claims"
    folder.mkdir(parents=True)
    monkeypatch.setattr(origin, "FOLDER", folder)
    monkeypatch.setattr(origin, "ROOT", tmp_path)
    monkeypatch.setattr(rearranging, "ROOT", tmp_path)
    (folder / "toy.py").write_text("one = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "src")
    git(tmp_path, "commit", "-qm", "one")
    run_claim(claim(LONGER_LOWER), SEEDS[:2], tmp_path / "toy.json")
    (folder / "toy.py").write_text("two = 1\n")
    git(tmp_path, "commit", "-qam", "two")
    return tmp_path


def git(root: Path, *words: str) -> None:
    who = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(root), *who, *words], check=True, capture_output=True)


def test_rearranged_code_keeps_its_record_when_it_rehearses_alike(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = checkout / "toy.json", []

    def rehearsed(key: str, root: Path) -> bytes:
        asked.append((root / "src/imagewright/bench/claims/toy.py").read_text())
        return b"rows"

    monkeypatch.setattr(rearranging, "_rehearsed", rehearsed)
    with pytest.raises(UserError, match="other code"):
        run_claim(claim(LONGER_LOWER), SEEDS, out)
    assert rearrange("toy", out) and asked == ["one = 1\n", "two = 1\n"]
    assert not rearrange("toy", out)  # it is known by now
    (step,) = run_claim(claim(LONGER_LOWER), SEEDS, out)["rearranged"]
    record = json.loads(out.read_text())
    assert list(record["seeds"]) == [str(seed) for seed in SEEDS] and record["rearranged"] == [step]
    assert [record["seeds"][str(seed)]["code"] for seed in SEEDS] == [step["from"]] * 2 + [step["to"]] * 3
    (checkout / "src/imagewright/bench/claims/toy.py").write_text("three = 1\n")
    with pytest.raises(UserError, match="files are not committed"):
        rearrange("toy", out)
    git(checkout, "commit", "-qam", "three")
    assert rearrange("toy", out) and len(json.loads(out.read_text())["rearranged"]) == 2
    assert origin.equal_codes(json.loads(out.read_text())) >= {step["from"], step["to"]}


def test_rearranged_code_that_rehearses_otherwise_is_refused(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (checkout / "toy.json").read_bytes()
    monkeypatch.setattr(rearranging, "_rehearsed", lambda key, root: str(root).encode())
    with pytest.raises(UserError, match=r"the rehearsals of commit \w{10} and of what stands here differ"):
        rearrange("toy", checkout / "toy.json")
    assert (checkout / "toy.json").read_bytes() == before


def test_a_rehearsal_notes_settings_and_cuts_trainings() -> None:
    notes: list[str] = []
    oracle, method = ring(0), EDM(sigma_data=0.7)
    with rehearsal.cut_trainings(notes):
        for lr in (1e-3, 2e-3):
            parts = Parts(denoiser=Trained(module=point_denoiser(4, 2, 0)))
            run = PointRun(iterations=1_000_000, batch=4, lr=lr)
            distil(method, parts, mixture_points(oracle), run)
        plane.train(point_denoiser(4, 2, 0), plane.from_set(torch.zeros(4, 2, 1, 1)), PointTraining(iterations=10**6))
    assert len(notes) == 3 and "lr=0.001" in notes[0] and "lr=0.002" in notes[1] and "iterations=1000000" in notes[2]


def test_tuning_seeds_are_run_and_not_recorded(tmp_path: Path) -> None:
    run_claim(claim(LONGER_LOWER), [0, 999], tmp_path / "toy.json")
    assert ASKED == [0, 999] and not (tmp_path / "toy.json").exists()


@pytest.mark.parametrize("seeds", [[0, 10_000], [1_000], [11_000], [-1], [10_000, 10_000], []])
def test_seeds_of_neither_range_are_refused(seeds: list[int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--seeds is"):
        run_claim(claim(LONGER_LOWER), seeds, tmp_path / "toy.json")
    assert not ASKED


def test_tuning_and_reported_seeds_share_no_stream() -> None:
    """Also after what claims add to a seed for streams of their own."""
    assert TUNING_SEEDS.stop + 8_999 <= REPORTED_SEEDS.start


def test_smoke_writes_nothing(tmp_path: Path) -> None:
    run_claim(claim(LONGER_LOWER), SEEDS[:1], tmp_path / "toy.json", budget="smoke")
    assert not (tmp_path / "toy.json").exists()


def test_a_record_of_another_claim_is_refused(tmp_path: Path) -> None:
    (tmp_path / "toy.json").write_text('{"format": "imagewright-claim/1", "key": "other"}')
    with pytest.raises(UserError, match=r"toy\.json is not a record of claim 'toy'"):
        run_claim(claim(LONGER_LOWER), SEEDS[:1], tmp_path / "toy.json")


def test_a_missing_row_is_named() -> None:
    with pytest.raises(KeyError, match="no row 'them'"):
        Rows(measure(0, "full")).score("them")


def test_ledger_shows_figures_verdict_notes_and_command(tmp_path: Path) -> None:
    run_claim(claim(OURS_LOWER, HALF), SEEDS, tmp_path / "claims" / "toy.json")
    (tmp_path / "claims" / "toy.md").write_text("What was tried.\n")
    path = tmp_path / "claims" / "toy.json"
    path.write_text(path.read_text().replace("longer halves it", "longer |halves| it"))
    missing = write_ledger(tmp_path / "claims", tmp_path / "claims.md", ["toy", "absent"])
    page = (tmp_path / "claims.md").read_text()
    assert missing == ["absent"]
    assert "| **does not hold** | 1 does not, 1 undecided | 5 |" in page
    assert "**Does not hold.** What was tried." in page
    assert "| ours is lower | 0.8 | -1.59 to 3.19 | 0 | undecided |" in page
    assert r"| longer \|halves\| it | " in page and "| 2.5 times | does not hold |" in page
    assert "| ours, longer | 2.5 ± 1.6 | 9 | 0.25 |" in page
    assert "`imagewright bench claims toy --seeds 10000 10001 10002 10003 10004`: 0 to 0 CPU seconds a seed" in page
    assert (tmp_path / "claims" / "toy.png").read_bytes().startswith(b"\x89PNG")


def test_claims_that_cost_little_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cheap = replace(claim(LONGER_LOWER), key="edm")
    monkeypatch.setattr(bench, "KEYS", ("edm", "ict"))
    monkeypatch.setattr(bench, "load_claim", lambda key: cheap)
    first, again = tmp_path / "first", tmp_path / "again"
    main(["bench", "claims", "edm", "--out", str(first)])
    others = [str(seed) for seed in REPORTED_SEEDS[5:10]]
    more = ["--out", str(again), "--compare", str(first), "--at-most", "60"]
    main(["bench", "claims", "--all", "--seeds", *others, *more])
    shown = capsys.readouterr().out
    assert "left out: ict, without a record" in shown and "edm: holds, again" in shown
    assert list(json.loads((again / "edm.json").read_text())["seeds"]) == others


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["edm", "--seeds", "5", "10000"], "all must lie in 10000..10999 (recorded) or all in 0..999"),
        (["edm", "--all"], "--all measures every claim; leave out the names"),
        (["--all", "--at-most", "0"], "--at-most is 0.0; it must be positive and finite"),
        (["other"], "there is no claim 'other'"),
        ([], "name at least one claim"),
    ],
)
def test_bad_options_are_one_sentence(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "claims", *words])
    assert complaint in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("key", KEYS)
def test_every_claim_runs(key: str) -> None:
    """In its smoke setting: that it runs and every check finds its rows, not what it finds."""
    claim = load_claim(key)
    assert claim.key == key and claim.headline and claim.miniature and claim.checks
    record = run_claim(claim, [0], budget="smoke")
    assert len({row["name"] for row in record["summary"]}) == len(record["summary"]) > 1
    assert all(math.isfinite(check["mean"]) for check in record["checks"])
