"""Where fkodom's tests expect what ours does not do, with the reason; a plugin for pytest."""

from __future__ import annotations

import pytest
import torch

CAUSAL = "they expect causal attention on a CPU to be refused, as xformers has none there; ours computes it"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Expect those to fail."""
    for item in items:
        values = getattr(item, "callspec", None)
        given = {} if values is None else values.params
        alike = len(given.get("segment_lengths", ())) == len(given.get("dilation_rates", ()))
        refused = (
            item.name.startswith(("test_dilated_attention", "test_multihead")) and given.get("is_causal") and alike
        )
        if refused and not torch.cuda.is_available():
            item.add_marker(pytest.mark.xfail(reason=CAUSAL, strict=True))
