"""The table of ten policies, and what a policy refuses."""

import re
from typing import Any

import pytest

from longattn.bufmgr import DEFAULT_CONFIGS, AttentionBufferManager, BufferConfig, BufferType
from longattn.bufmgr.spec import parse_type


def test_ten_types_and_their_policies():
    """The types, the limits and the zeros are those that seeds/000 gives."""
    names = ["QUERY", "KEY", "VALUE", "OUTPUT", "SCORES", "WEIGHTS", "TEMP", "COMM", "MASK", "CACHE"]
    assert [member.name for member in BufferType] == names
    assert list(DEFAULT_CONFIGS) == list(BufferType)
    assert [kind.name for kind, config in DEFAULT_CONFIGS.items() if config.zero_init] == ["OUTPUT"]
    assert [kind.name for kind, config in DEFAULT_CONFIGS.items() if config.pinned] == ["COMM"]
    assert all(5 <= config.max_cached_buffers <= 10 for config in DEFAULT_CONFIGS.values())
    large = {BufferType.SCORES, BufferType.WEIGHTS, BufferType.CACHE}
    assert {kind for kind, config in DEFAULT_CONFIGS.items() if config.prefer_numa} == large
    assert {kind for kind, config in DEFAULT_CONFIGS.items() if config.typical_size_mb > 16} == large


def test_table_is_read_only():
    with pytest.raises(TypeError):
        DEFAULT_CONFIGS[BufferType.QUERY] = BufferConfig()  # pyright: ignore[reportIndexIssue]


def test_custom_config_of_the_guide():
    """The row in seeds/000 replaces that type's row and no other."""
    config = BufferConfig(
        typical_size_mb=16.0,
        reuse_frequency="high",
        lifetime="iteration",
        prefer_bucketed=False,
        prefer_numa=True,
        zero_init=False,
    )
    manager = AttentionBufferManager(custom_configs={BufferType.SCORES: config}, enable_reuse=True)
    assert manager.configs == {**DEFAULT_CONFIGS, BufferType.SCORES: config}


@pytest.mark.parametrize(
    ("field", "value", "error", "text"),
    [
        ("typical_size_mb", 0, ValueError, "above 0"),
        ("typical_size_mb", -1.0, ValueError, "above 0"),
        ("typical_size_mb", float("nan"), ValueError, "finite"),
        ("typical_size_mb", "16", TypeError, "number of MiB"),
        ("typical_size_mb", True, TypeError, "number of MiB"),
        ("reuse_frequency", "often", ValueError, "'low', 'medium', 'high'"),
        ("lifetime", "for ever", ValueError, "'ephemeral', 'iteration', 'persistent'"),
        ("prefer_bucketed", 1, TypeError, "True or False"),
        ("prefer_numa", "yes", TypeError, "True or False"),
        ("zero_init", None, TypeError, "True or False"),
        ("pinned", 0, TypeError, "True or False"),
        ("max_cached_buffers", -1, ValueError, "0 or more"),
        ("max_cached_buffers", 2.0, TypeError, "whole number"),
        ("max_cached_buffers", True, TypeError, "whole number"),
        ("max_cached_mb", -1, ValueError, "0 or more"),
        ("max_cached_mb", float("inf"), ValueError, "finite"),
    ],
)
def test_bad_policy(field: str, value: Any, error: type[Exception], text: str):
    """The error names the field, what was expected and what came."""
    with pytest.raises(error, match=f"{field} must be .*{re.escape(text)}.*got {re.escape(repr(value))}"):
        BufferConfig(**{field: value})


@pytest.mark.parametrize("kind", list(BufferType))
def test_type_by_name(kind: BufferType):
    assert parse_type(kind) is parse_type(kind.name) is parse_type(kind.value) is kind


@pytest.mark.parametrize(
    ("value", "error"), [("querry", ValueError), ("Query", ValueError), (0, TypeError), (None, TypeError)]
)
def test_wrong_type(value: Any, error: type[Exception]):
    """All ten names stand in the error."""
    with pytest.raises(error, match=f"type must be .*query, key.*cache, got {value!r}"):
        parse_type(value)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"custom_configs": []}, TypeError, "custom_configs"),
        ({"custom_configs": {BufferType.KEY: {}}}, TypeError, "must be a BufferConfig"),
        ({"custom_configs": {"keys": BufferConfig()}}, ValueError, "custom_configs key"),
        ({"enable_reuse": 1}, TypeError, "enable_reuse"),
        ({"enable_preallocation": None}, TypeError, "enable_preallocation"),
        ({"enable_profiling": "on"}, TypeError, "enable_profiling"),
        ({"lightweight": 0}, TypeError, "lightweight"),
        ({"upstream": object()}, TypeError, "upstream"),
    ],
)
def test_bad_manager_arguments(arguments: dict[str, Any], error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        AttentionBufferManager(**arguments)
