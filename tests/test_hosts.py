"""`tools.hosts`: frames go where they should, and a cut link between namespaces is noticed and mended."""

import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from tests.workspace import ROOT
from tools.hosts import refusal
from tools.hosts_switch import targets


def test_frames_go_to_their_port():
    """By the last byte of the address; to all others where it is for all; nowhere back, and to no port that is not there."""

    def frame(to: bytes) -> bytes:
        return bytes(10) + to + bytes(60)

    assert targets(frame(b"\x02\0\0\0\0\x01"), 0, 3) == [1]
    assert targets(frame(b"\xff" * 6), 1, 3) == [0, 2]
    assert targets(frame(b"\x02\0\0\0\0\x01"), 1, 3) == []
    assert targets(frame(b"\x02\0\0\0\0\x07"), 0, 3) == []


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(400)
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here")
def test_a_cut_link_is_noticed_and_mended():
    """Three hosts: every rank raises GroupError while the link is cut, and is right after a reset when it is back."""
    reason = refusal() if sys.platform == "linux" and os.geteuid() == 0 else "network namespaces need root on Linux"
    if reason is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "tools.hosts", "--hosts", "3", "--only", "cut"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
