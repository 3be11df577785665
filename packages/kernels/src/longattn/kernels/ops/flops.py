"""`register_flops`: what torch's FLOP counter says of our ops, without importing it.

Its module tries to import triton, which takes longer than all of ours. So a formula waits until somebody imports the counter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"


class _Waiting(MetaPathFinder):
    """Stands before the finders until the counter's module is imported, and then registers what waits."""

    def __init__(self) -> None:
        self.formulas: list[tuple[Any, Callable[..., int]]] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Leave finding to the others; of the counter's module, register as soon as it has run."""
        if fullname != _COUNTER:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                for op, formula in self.formulas:
                    module.register_flop_formula(op)(formula)

            spec.loader.exec_module = run_and_register
        return spec


_waiting = _Waiting()


def register_flops(op: Any, formula: Callable[..., int]) -> None:
    """Tell torch's FLOP counter the FLOPs of an op: now where its module is imported, else when it will be.

    Args:
        op: an overload packet, `torch.ops.NAMESPACE.NAME`.
        formula: (shapes of tensors, other arguments) -> FLOPs, as `torch.utils.flop_counter.register_flop_formula` takes it.
    """
    counter = sys.modules.get(_COUNTER)
    if counter is not None:
        counter.register_flop_formula(op)(formula)
        return
    if not _waiting.formulas:
        sys.meta_path.insert(0, _waiting)
    _waiting.formulas.append((op, formula))
