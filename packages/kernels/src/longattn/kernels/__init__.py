"""Attention kernels behind one dispatch table: `attend` a pattern, `merge` states, `explain` the choice."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

logging.getLogger("longattn").addHandler(logging.NullHandler())

if TYPE_CHECKING:
    __version__: str
    from longattn.kernels.check import LayoutWarning
    from longattn.kernels.dispatch.capability import Capability
    from longattn.kernels.dispatch.environment import Environment
    from longattn.kernels.dispatch.table import Explanation, backends
    from longattn.kernels.entry import attend
    from longattn.kernels.explaining import explain
    from longattn.kernels.fused import fused_attention
    from longattn.kernels.installed import installation
    from longattn.kernels.native.building import build_native
    from longattn.kernels.preparing import PreparedAttention, prepare, prepared_stats
    from longattn.kernels.problem import AttentionProblem
    from longattn.kernels.reference import reference_attention
    from longattn.kernels.state import AttentionState, merge
    from longattn.kernels.terms import Alibi, RelativeBias, Softcap

_HOME = {
    "Alibi": "terms",
    "AttentionProblem": "problem",
    "AttentionState": "state",
    "Capability": "dispatch.capability",
    "Environment": "dispatch.environment",
    "Explanation": "dispatch.table",
    "LayoutWarning": "check",
    "PreparedAttention": "preparing",
    "RelativeBias": "terms",
    "Softcap": "terms",
    "attend": "entry",
    "backends": "dispatch.table",
    "build_native": "native.building",
    "explain": "explaining",
    "fused_attention": "fused",
    "installation": "installed",
    "merge": "state",
    "prepare": "preparing",
    "prepared_stats": "preparing",
    "reference_attention": "reference",
}

__all__ = [
    "Alibi",
    "AttentionProblem",
    "AttentionState",
    "Capability",
    "Environment",
    "Explanation",
    "LayoutWarning",
    "PreparedAttention",
    "RelativeBias",
    "Softcap",
    "attend",
    "backends",
    "build_native",
    "explain",
    "fused_attention",
    "installation",
    "merge",
    "prepare",
    "prepared_stats",
    "reference_attention",
]

if not TYPE_CHECKING:

    def __getattr__(name):
        if name == "__version__":
            from importlib.metadata import version

            return version("longattn-kernels")
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
