"""What lasts says so once: on a terminal on stderr, else by logging; what ends soon says nothing."""

import io
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from longattn.patterncache import from_mask_mod
from longattn.patterncache import progress as where
from longattn.patterncache.interop import masks
from longattn.patterncache.progress import progress

LOGGER = logging.getLogger("longattn.patterncache")


class Stderr(io.StringIO):
    """A terminal, or a file."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def told(request, monkeypatch, caplog):
    """Returns what was said where it belongs, and that nothing was said in the other place."""
    stderr = Stderr(request.param)
    # pytest puts its own sys.stderr in place after fixtures.
    monkeypatch.setattr(where, "sys", SimpleNamespace(stderr=stderr))
    caplog.set_level("INFO", logger="longattn.patterncache")

    def text() -> str:
        logged = "".join(f"{record.getMessage()}\n" for record in caplog.records)
        said, other = (stderr.getvalue(), logged) if request.param else (logged, stderr.getvalue())
        assert other == ""
        return said

    return text


def test_what_ends_soon_says_nothing(told):
    """Within its patience."""
    with progress("counting to three", LOGGER):
        pass
    assert told() == ""


def test_what_lasts_says_so_once(told):
    """At the beginning what, at the end how long."""
    with progress("counting to three", LOGGER, after=0):
        assert "counting to three" in told()
        assert " in " not in told()
    assert "done in 0." in told()
    assert told().count("done") == 1


def test_what_fails_says_so(told):
    """And the error goes on."""
    with pytest.raises(KeyError), progress("counting to three", LOGGER, after=0):
        raise KeyError
    assert "failed in 0." in told()


def test_without_stderr(monkeypatch, caplog):
    """Where a process has none, the logger is told."""
    monkeypatch.setattr(where, "sys", SimpleNamespace(stderr=None))
    with caplog.at_level("INFO", logger="longattn.patterncache"), progress("counting to three", LOGGER, after=0):
        pass
    assert ["counting to three", "counting to three: done in 0.0 s"] == [r.getMessage() for r in caplog.records]


@pytest.mark.parametrize("verify", ["every", "samples"])
def test_a_large_mask_says_so(told, verify, monkeypatch):
    """Its length, heads and what is looked at, while it is imported."""
    monkeypatch.setattr(masks, "progress", lambda what, logger: progress(what, logger, after=0))
    from_mask_mod(lambda b, h, q, k: (q >= k) & (q - k < 5), 64, as_tensor=np.asarray, verify=verify)
    assert "importing a mask of 64 tokens" in told()


def test_a_thread_says_so_after_a_while(told):
    """The work itself need not look at the clock."""
    with progress("counting to three", LOGGER, after=0.01):
        while "counting" not in told():
            pass
    assert "done in" in told()
