"""Every public signature of patterncache, kernels and attention with a table of odd values: it serves, or names the parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import longattn.attention
import longattn.kernels
import longattn.patterncache
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


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS.keys())
def test_odd_values(make: Call) -> None:
    """One parameter at a time."""
    function, arguments = make()
    function(**arguments)
    wrong = []
    for parameter in arguments:
        for name, value in ODD.items():
            function, good = make()
            try:
                function(**{**good, parameter: value})
            except (TypeError, ValueError) as error:
                if parameter not in str(error):
                    wrong.append((parameter, name, repr(error)[:200]))
            except Exception as error:  # noqa: BLE001 - which one it is, is what the test reports
                wrong.append((parameter, name, repr(error)[:200]))
    assert wrong == [], "\n".join(map(str, wrong))
