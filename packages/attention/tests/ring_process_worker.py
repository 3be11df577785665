"""One rank of a distributed test: `ring_process_worker.py CASES WORLD RANK FOLDER`, started once per rank by `test_ring_processes.py`.

Runs every function of the module files CASES (joined as paths are) whose name starts with "case_", in order, and writes what went wrong to
FOLDER/RANK.json: {case: traceback or ""}. Ranks meet in a file, not at a port.
"""

import importlib.util
import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

from longattn.kernels.testing import poisoned_memory


def main() -> None:
    """Meet, run, report."""
    world, rank, folder = int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    warnings.simplefilter("error")
    # torch's own deprecations of what its DDP, FSDP and checkpoint code calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    found, report = {}, folder / f"{rank}.json"
    for number, path in enumerate(sys.argv[1].split(os.pathsep)):
        for name, case in vars(load(Path(path), f"cases{number}")).copy().items():
            if name.startswith("case_"):
                # Written as it goes: a hang leaves what was found so far, and where.
                found[name] = "began, and did not end"
                report.write_text(json.dumps(found))
                found[name] = attempt(case)
                report.write_text(json.dumps(found))
    dist.destroy_process_group()


def load(path: Path, name: str) -> ModuleType:
    """The module in a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def attempt(case) -> str:
    """The traceback of a case, or ""."""
    try:
        with poisoned_memory():
            case()
    except Exception:  # noqa: BLE001 - whatever a case raises is its result
        return traceback.format_exc()
    finally:
        dist.barrier()
    return ""


if __name__ == "__main__":
    main()
