"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from imagewright.cli.main import main


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail as a user's mistake; returns what it says, on one line."""

    def run(*words: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        assert stop.value.code == 2
        told = capsys.readouterr().err
        assert "Traceback" not in told
        return " ".join(told.split())

    return run
