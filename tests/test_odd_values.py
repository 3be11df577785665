"""Every public signature of patterncache, kernels and attention with a table of odd values: it serves, or names the parameter."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

import tests.odd_calls_attention  # noqa: F401 - adds its calls
from tests.odd_calls import CALLS, Call


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(3)


ODD: dict[str, Any] = {
    "None": None,
    "True": True,
    "0": 0,
    "-1": -1,
    "1.5": 1.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "2**70": 2**70,
    "complex": 1j,
    "empty text": "",
    "text": "banana",
    "long text": "x" * 10**5,
    "long number": 10**5000,
    "long list": ["x" * 100] * 10**4,
    "bytes": b"temp",
    "list": [],
    "nested list": [[1]],
    "dict": {},
    "set": {3},
    "object": object(),
    "type": int,
    "function": len,
    "tensor": torch.ones(3),
    "scalar tensor": torch.tensor(2),
    "sparse": torch.eye(3).to_sparse(),
    "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "meta": torch.ones(2, device="meta"),
    "fake": fake(),
    "dtype": torch.float32,
    "device": torch.device("cpu"),
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    yield
    dist.destroy_process_group()


# (call or parameter's name, odd value or None for all): what a call may do with it instead.
OTHERWISE: dict[tuple[str, str | None], str] = {
    ("build", "function"): "what the caller's own function raises is raised",
    ("key", None): "a key is that of a mapping: Python's own words where it has no hash",
    ("mask_mod", None): "as `build`",
    ("png", "empty text"): "an OSError, as of any path",
    ("png", "long text"): "an OSError, as of any path",
    ("q", "nested"): "names k, which is not nested like q",
    ("query", "nested"): "as `q`",
    ("memory_mask", None): "names the attention_mask of memory's own attention",
    ("memory_key_padding_mask", None): "names its key_padding_mask",
    ("config", "dict"): "names what the mapping lacks",
}


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS.keys())
def test_odd_values(make: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One parameter at a time; what writes to paths writes into an empty folder."""
    monkeypatch.chdir(tmp_path)
    function, arguments = make()
    function(**arguments)
    wrong = []
    for parameter in arguments:
        for name, value in ODD.items():
            if (parameter, name) in OTHERWISE or (parameter, None) in OTHERWISE:
                continue
            function, good = make()
            try:
                function(**{**good, parameter: value})
            except (TypeError, ValueError) as error:
                if len(str(error)) > 5000:
                    wrong.append((parameter, name, f"{len(str(error))} characters"))
                if parameter not in str(error) and not (parameter == "attention_mask" and "att_mask" in str(error)):
                    wrong.append((parameter, name, repr(error)[:200]))
            except Exception as error:  # noqa: BLE001 - which one it is, is what the test reports
                wrong.append((parameter, name, repr(error)[:200]))
    assert wrong == [], "\n".join(map(str, wrong))


# Public names without a call here: records that calls return or rows declare, and what has no parameter of its own.
RECORDS = {
    "patterncache": {
        "Affine", "Band", "Branch", "FlexMask", "Gap", "IndexArrays", "IndexTensors", "Lint", "Listed", "Plan", "Reach", "ScoredBlocks", "Shares",
    },
    "kernels": {"AttentionProblem", "Capability", "Explanation"},
    # Enumerations, and what is for transformers (its tests are in `test_use_pattern`).
    "attention": {"TileOrder", "TileType", "use_pattern", "register_with_transformers", "streaming_cache", "GroupError", "PagePool"},
}  # fmt: skip


@pytest.mark.parametrize("package", RECORDS)
def test_every_public_name_is_here(package: str) -> None:
    """A new public name shows up in this test, so that it is tried, too."""
    module = import_module(f"longattn.{package}")
    tried = {name.split(".")[1].split()[0] for name in CALLS if name.startswith(f"{package}.")}
    public = {
        name for name in module.__all__ if callable(getattr(module, name)) and not _takes_nothing(getattr(module, name))
    }
    assert public - tried - RECORDS[package] == set()
    assert not tried & RECORDS[package] and RECORDS[package] <= public


def _takes_nothing(function: Any) -> bool:
    try:
        return not inspect.signature(function).parameters
    except ValueError:  # a warning's class
        return True
