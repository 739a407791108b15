"""Claims: measured seeds are kept, spread and verdict follow the rows, the ledger shows them; smoke runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from imagewright.bench.claims import KEYS, Budget, Check, Claim, Row, Rows, load_claim
from imagewright.bench.claims.ledger import write_ledger
from imagewright.bench.claims.runner import rows_of, run_claim
from imagewright.types import UserError

ASKED: list[int] = []


def measure(seed: int, budget: Budget) -> Sequence[Row]:
    ASKED.append(seed)
    return [
        Row(name="ours", score=1.0 + seed, cost=3, curve="line"),
        Row(name="ours, longer", score=0.5 + seed, cost=9, curve="line", more={"recall": 0.25}),
        Row(name="theirs", score=2.0 if seed < 2 else 0.0, cost=3),
    ]


def claim(*checks: Check) -> Claim:
    return Claim(
        key="toy", paper="2206.00364", headline="1", miniature="A toy.", measure="error", cost="NFE", run=measure,
        checks=checks,
    )  # fmt: skip


OURS_LOWER = Check(says="ours is lower", holds=lambda r: r.score("ours") < r.score("theirs"))
LONGER_LOWER = Check(says="longer is lower", holds=lambda r: r.score("ours, longer") < r.score("ours"))


@pytest.fixture(autouse=True)
def forget() -> None:
    ASKED.clear()


def test_mean_spread_and_checks_by_seed(tmp_path: Path) -> None:
    record = run_claim(claim(OURS_LOWER, LONGER_LOWER), [0, 1, 4], tmp_path / "toy.json")
    first = record["summary"][0]
    assert (first["mean"], first["least"], first["most"]) == (pytest.approx(8 / 3), 1.0, 5.0)
    assert first["std"] == pytest.approx((13 / 3) ** 0.5)
    assert record["checks"][0]["by_seed"] == {"0": True, "1": False, "4": False}
    assert record["verdict"] == "does not hold"
    assert json.loads((tmp_path / "toy.json").read_text()) == record


@pytest.mark.parametrize(("seeds", "verdict"), [([0, 1], "undecided"), ([0, 1, 2], "holds")])
def test_two_seeds_decide_nothing(seeds: list[int], verdict: str) -> None:
    assert run_claim(claim(LONGER_LOWER), seeds)["verdict"] == verdict


def test_measured_seeds_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "toy.json"
    run_claim(claim(LONGER_LOWER), [0, 1], out)
    record = run_claim(claim(LONGER_LOWER), [0, 1, 2], out)
    assert ASKED == [0, 1, 2]
    assert list(rows_of(record)) == [0, 1, 2] and rows_of(record)[2].score("ours") == 3.0


def test_smoke_writes_nothing(tmp_path: Path) -> None:
    run_claim(claim(LONGER_LOWER), [0], tmp_path / "toy.json", budget="smoke")
    assert not (tmp_path / "toy.json").exists()


def test_a_record_of_another_claim_is_refused(tmp_path: Path) -> None:
    (tmp_path / "toy.json").write_text('{"format": "imagewright-claim/1", "key": "other"}')
    with pytest.raises(UserError, match=r"toy\.json is not a record of claim 'toy'"):
        run_claim(claim(LONGER_LOWER), [0], tmp_path / "toy.json")


def test_a_missing_row_is_named() -> None:
    with pytest.raises(KeyError, match="no row 'them'"):
        Rows(measure(0, "full")).score("them")


def test_ledger_shows_figures_verdict_and_command(tmp_path: Path) -> None:
    run_claim(claim(OURS_LOWER), [0, 1, 4], tmp_path / "claims" / "toy.json")
    missing = write_ledger(tmp_path / "claims", tmp_path / "claims.md", ["toy", "absent"])
    page = (tmp_path / "claims.md").read_text()
    assert missing == ["absent"]
    assert "**does not hold**" in page and "ours is lower: 1 of 3 seeds" in page
    assert "| ours, longer | 2.167 ± 2.1 | 9 | 0.25 |" in page
    assert "`imagewright bench claims toy --seeds 0 1 4`" in page
    assert (tmp_path / "claims" / "toy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("key", KEYS)
def test_every_claim_runs(key: str) -> None:
    """In its smoke setting: that it runs and every check finds its rows, not what it finds."""
    claim = load_claim(key)
    assert claim.key == key and claim.headline and claim.miniature and claim.checks
    record = run_claim(claim, [0], budget="smoke")
    assert len({row["name"] for row in record["summary"]}) == len(record["summary"]) > 1
    assert all(set(check["by_seed"]) == {"0"} for check in record["checks"])
