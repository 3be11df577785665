"""The end of a lease on request: who may release what, and what happens to the handle."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from longattn.bufmgr.checks import describe
from longattn.bufmgr.leasing import guard
from longattn.bufmgr.leasing.lease import Lease
from longattn.bufmgr.spec import BufferType


def release_lease(leases: Mapping[int, Lease], tensor: object, kind: BufferType, tensor_references: int) -> Lease:
    """Release the lease of a handle: empty the handle if nothing else references it, else note the lease as `released`.

    leases: by storage address. tensor_references: sys.getrefcount(tensor) as counted in the function that the user called.
    Returns the lease. Raises TypeError for no tensor, ValueError for a view, a foreign tensor, a wrong type or a second
    release; then nothing has changed.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"tensor must be a tensor that allocate returned, got {describe(tensor)}")
    try:
        lease = leases.get(guard.storage_address(tensor))
    except RuntimeError:  # a tensor without a storage, such as a sparse one
        lease = None
    handle_id = id(tensor)
    if lease is None or lease.ended or lease.handle_id != handle_id:
        raise ValueError(f"tensor must be a buffer leased here, got {_why_not(lease, tensor)}")
    if lease.kind is not kind:
        raise ValueError(f"type must be {lease.kind.name}, which this buffer was leased as, got {kind.name}")
    # No function is called between these two lines, so under the GIL no other thread runs between them. Without the GIL
    # counts are not trusted, no handle is emptied, and of two threads that race both may note the release.
    won = lease.handle_id == handle_id
    lease.handle_id = 0
    if not won:
        raise ValueError("tensor must be a buffer leased here, got one that another thread is releasing")
    fresh = guard.fresh_counts()
    only_reference: bool = fresh is not None and (  # pyright: ignore[reportUnknownVariableType]
        (
            # A handle without a name, as in deallocate(allocate(...)), has fewer references than one with a name.
            tensor_references <= fresh.tensor_references
            and tensor._use_count() == fresh.tensor_owners  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
            and (lease.owners.value == guard.TAKEN or lease.has_one_handle())
        )
        or _only_caller_sees(lease, tensor, tensor_references, fresh)
    )
    if only_reference:
        if lease.block is None:
            note_stream(tensor)
        # Drops the storage; of an ordinary lease this is the last owner, which ends inside this line.
        if tensor.requires_grad:
            with torch.no_grad():
                tensor.set_()  # pyright: ignore[reportCallIssue]
        else:
            tensor.set_()  # pyright: ignore[reportCallIssue]
    else:
        # The handle lives on and owns the storage, so a slot is not free and no other thread takes it meanwhile.
        lease.handle_id = -handle_id
    return lease


def note_stream(tensor: torch.Tensor) -> None:
    """Tell torch's CUDA allocator that the current stream may still use the memory: no other stream gets it before that one is done."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


def _only_caller_sees(lease: Lease, tensor: torch.Tensor, tensor_references: int, fresh: guard.ReferenceCounts) -> bool:
    """Decide the cases that the check in `release_lease` leaves open: leases that are no slots, and calls under a frame
    evaluator.
    """
    if tensor_references > fresh.tensor_references and tensor_references > guard.references_under_evaluator():
        return False
    if tensor._use_count() != fresh.tensor_owners:  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        return False
    return lease.has_one_handle() if lease.is_slot else guard.only_tensor_owns(tensor, fresh)


def _why_not(lease: Lease | None, tensor: torch.Tensor) -> str:
    if lease is not None and not lease.ended:
        if lease.released and lease.handle_id == -id(tensor):
            return f"one that was released before and that something else still references{_history(lease)}"
        return "a view, or another tensor over the same memory: release the tensor that allocate returned"
    if tensor.layout is torch.strided and tuple(tensor.shape) == (0,):
        return "an empty tensor: released before, or never from here"
    return f"a tensor from elsewhere, of shape {tuple(tensor.shape)} on {tensor.device}"


def _history(lease: Lease) -> str:
    return "" if lease.note is None else f" ({lease.note})"
