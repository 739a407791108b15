"""Keep a claim's record when its files were rearranged: only with a proof that they give the same rows."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from imagewright.bench.claims import rehearsal
from imagewright.bench.claims.origin import ROOT, code_hash, commit, commit_of, equal_codes, git
from imagewright.bench.claims.runner import read_claim
from imagewright.files import write_json
from imagewright.locks import changing
from imagewright.types import UserError


def rearrange(key: str, out: Path) -> bool:
    """Note in a record that its claim's files were rearranged; False where they were not.

    What stands in the newest commit that has the code of the record is rehearsed beside what stands here. Raises
    UserError where there is no such commit, files differ from the last one, or the rehearsals differ.
    """
    with changing(out):
        record = read_claim(out)
        if record is None or record["key"] != key:
            raise UserError(f"{out} is not a record of claim {key!r}")
        equal, now, here = equal_codes(record), code_hash(key), commit()
        measured = {entry["code"] for entry in record["seeds"].values()}
        if measured <= equal:
            return False
        steps = record.get("rearranged", [])
        newest = steps[-1]["to"] if steps else next(iter(measured))
        before = None if newest is None else commit_of(key, newest)
        if here is None or here.endswith("+") or before is None:
            raise UserError(
                f"claim {key!r}: no commit of this repository has the record's code, or files are not committed"
            )
        _prove(key, before)
        proof = {"commit": here, "from": newest, "to": now, "before": before, "proof": rehearsal.PROOF}
        write_json(out, record | {"rearranged": [*steps, proof]})
    return True


def _prove(key: str, before: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        packed = git("archive", before, "src")
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            tar.extractall(folder, filter="data")
        outcomes = [_rehearsed(key, root) for root in (Path(folder), ROOT)]
    if outcomes[0] != outcomes[1]:
        raise UserError(
            f"claim {key!r}: the rehearsals of commit {before[:10]} and of what stands here differ; "
            "--fresh measures it anew"
        )


def _rehearsed(key: str, root: Path) -> bytes:
    words: list[Any] = [sys.executable, "-P", Path(rehearsal.__file__), key]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(root / "src")}, capture_output=True, check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"claim {key!r} could not be rehearsed in {root}: {''.join(last)}")
    return done.stdout
