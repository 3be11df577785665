"""Data parallel and fully sharded training of a small LongNet on two gloo processes is training on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

WORKER = Path(__file__).with_name("distributed_worker.py")
WORLD = 2


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here")
def test_ddp_and_fsdp2_train_as_one_process_does(tmp_path):
    """Two steps on a batch cut in two give the parameters of two steps on the whole."""
    command = [sys.executable, str(WORKER)]
    # Warnings of the workers are their own: torch's distributed code has some.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(WORLD)
    ]
    try:
        answers = [process.communicate(timeout=180) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for out, errors in answers:
        assert out.strip().endswith("ok"), errors[-2000:]
