"""`create_attention_buffer_manager`: a manager by keywords, in the order of the users' guide."""

from __future__ import annotations

from collections.abc import Mapping

from longattn.bufmgr.allocator import Allocator
from longattn.bufmgr.manager import AttentionBufferManager
from longattn.bufmgr.pressure import Cleanup
from longattn.bufmgr.spec import BufferConfig, BufferType


def create_attention_buffer_manager(
    enable_reuse: bool = True,
    enable_preallocation: bool = False,
    lightweight: bool = True,
    enable_profiling: bool = False,
    custom_configs: Mapping[BufferType, BufferConfig] | None = None,
    *,
    upstream: Allocator | None = None,
    cleanup: Cleanup = "adaptive",
    debug: bool = False,
) -> AttentionBufferManager:
    """Return a manager; the arguments are those of AttentionBufferManager."""
    return AttentionBufferManager(
        custom_configs,
        enable_reuse,
        enable_preallocation,
        enable_profiling,
        lightweight,
        upstream=upstream,
        cleanup=cleanup,
        debug=debug,
    )
