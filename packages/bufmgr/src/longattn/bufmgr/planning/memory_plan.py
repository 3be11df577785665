"""`plan_memory`: what a module's forward and backward hold at once, and how much less they can hold, without running them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from longattn.bufmgr.checks import check_flag, check_kind, check_shape, describe
from longattn.bufmgr.planning.lifetimes import Lifetime, MemoryLayout, lay_out, live_peak
from longattn.bufmgr.planning.recompute import Recompute
from longattn.bufmgr.planning.recording import LifetimeRecorder
from longattn.bufmgr.spec import MIB

Loss = Callable[[Any], object]


@dataclass(frozen=True)
class MemoryPlan:
    """What `plan_memory` found for one module and one set of shapes.

    before: the lifetimes in plain torch. after: those inside `apply()`. recomputed: tensors that are then made again in
    backward instead of being kept. Parameters and inputs, which live throughout, are in neither.
    """

    before: tuple[Lifetime, ...]
    after: tuple[Lifetime, ...]
    recomputed: int

    @property
    def peak_before(self) -> int:
        """Most bytes at once in plain torch."""
        return live_peak(self.before)

    @property
    def peak_after(self) -> int:
        """Most bytes at once inside `apply()`."""
        return live_peak(self.after)

    def layout(self) -> MemoryLayout:
        """Return the offset of each lifetime of `after` in one block, and the block's size."""
        return lay_out(self.after)

    def apply(self) -> contextlib.AbstractContextManager[object]:
        """Return a context for the module's forward; the loss and backward may follow inside or outside. Gradients have the
        same bits as without it.
        """
        return Recompute() if self.recomputed else contextlib.nullcontext()

    def report(self) -> str:
        """Return peaks before and after, the block, and the largest tensors at the peak before, as text."""
        before, after, block = self.peak_before, self.peak_after, self.layout().block_bytes
        saved = 1 - after / before if before else 0.0
        planned = f"planned: {after / MIB:.1f} MiB at once ({saved:.1%} less), in one block {block / MIB:.1f} MiB"
        lines = [
            f"plain torch: {before / MIB:.1f} MiB at once, in {len(self.before)} tensors",
            f"{planned}; {self.recomputed} tensors are made again in backward",
            "alive at the peak of plain torch, the largest first:",
        ]
        groups: dict[tuple[str, int], int] = {}
        for lifetime in _at_peak(self.before):
            key = (lifetime.name, lifetime.nbytes)
            groups[key] = groups.get(key, 0) + 1
        largest = sorted(groups.items(), key=lambda group: -group[0][1] * group[1])
        lines += [f"{count:>6} x {nbytes / MIB:>10.2f} MiB of {name}" for (name, nbytes), count in largest[:8]]
        return "\n".join(lines)


def plan_memory(
    module: torch.nn.Module,
    shapes: Sequence[Sequence[int] | torch.Tensor],
    *,
    backward: bool = True,
    loss: Loss | None = None,
) -> MemoryPlan:
    """Return what a call of the module holds at once, and a plan that holds less. Nothing is computed: tensors are fake.

    module: is not changed; its state is read only. shapes: of the inputs, in order, as sizes (torch's default dtype, on the CPU)
    or as tensors, "meta" ones too, of which shape and dtype count. backward: also plan the gradients of all
    parameters that want one; without it the call runs under no_grad, and there is nothing to save. Default True. loss: what to
    differentiate, a function of the module's result. Default the sum of every output.

    Memory inside an operation (a kernel's scratch) is not seen. Raises TypeError or ValueError that names the parameter, and
    what the module raises for these shapes, or because it needs the values of tensors.

        plan = plan_memory(model, [torch.empty(1, 32768, dtype=torch.long, device="meta")])
        print(plan.report())
        with plan.apply():
            logits = model(tokens)
        cross_entropy(logits.flatten(0, 1), targets).backward()
    """
    check_kind("module", module, torch.nn.Module, "a torch.nn.Module")
    check_flag("backward", backward)
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of the module's result or None, got {describe(loss)}")
    specs = _check_inputs(shapes)
    before, _ = _record(module, specs, backward, loss, None)
    after, recomputed = _record(module, specs, backward, loss, Recompute()) if backward else (before, 0)
    if live_peak(after) >= live_peak(before):  # nothing is gained: do nothing
        after, recomputed = before, 0
    return MemoryPlan(tuple(before), tuple(after), recomputed)


def _record(
    module: torch.nn.Module,
    specs: Sequence[torch.Tensor],
    backward: bool,
    loss: Loss | None,
    recompute: Recompute | None,
) -> tuple[list[Lifetime], int]:
    mode = FakeTensorMode()
    # The copy takes fake tensors in place of all parameters and buffers, so it costs no memory.
    state = {id(tensor): mode.from_tensor(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    twin = copy.deepcopy(module, cast("dict[int, Any]", state))
    with mode:
        inputs = [torch.empty(spec.shape, dtype=spec.dtype) for spec in specs]
        recorder = LifetimeRecorder()
        with recorder, torch.set_grad_enabled(backward):
            with contextlib.nullcontext() if recompute is None else recompute:
                result = twin(*inputs)
            if backward:
                torch.autograd.backward([_total(result, loss)])
            del result
        lifetimes = recorder.lifetimes()
    return lifetimes, 0 if recompute is None else recompute.recomputed


def _total(result: Any, loss: Loss | None) -> torch.Tensor:
    if loss is not None:
        total = loss(result)
        if not isinstance(total, torch.Tensor) or total.numel() != 1:
            raise TypeError(f"loss must return a tensor of one element, got {describe(total)}")
        return total
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not leaves:
        raise ValueError("module must return a tensor with a gradient, or backward=False must be given, got none")
    return torch.stack([leaf.sum() for leaf in leaves]).sum()


def _check_inputs(shapes: object) -> list[torch.Tensor]:
    is_scalar = getattr(shapes, "ndim", 1) == 0
    if isinstance(shapes, (str, bytes, torch.Tensor)) or not isinstance(shapes, Sequence) or is_scalar:
        raise TypeError(f"shapes must be a sequence of shapes or tensors, got {describe(cast('object', shapes))}")
    specs: list[torch.Tensor] = []
    for index, shape in enumerate(cast("Sequence[object]", shapes)):
        if isinstance(shape, torch.Tensor):
            specs.append(torch.empty(shape.shape, dtype=shape.dtype, device="meta"))
            continue
        try:
            specs.append(torch.empty(check_shape(shape), device="meta"))
        except (TypeError, ValueError) as error:
            raise type(error)(f"shapes[{index}] must be a shape or a tensor, got {describe(shape)}: {error}") from error
    return specs


def _at_peak(lifetimes: Sequence[Lifetime]) -> list[Lifetime]:
    peak = live_peak(lifetimes)
    for step in sorted({lifetime.first for lifetime in lifetimes}):
        alive = [lifetime for lifetime in lifetimes if lifetime.first <= step <= lifetime.last]
        if sum(lifetime.nbytes for lifetime in alive) == peak:
            return alive
    return []
