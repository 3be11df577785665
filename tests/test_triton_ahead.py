"""Compiling ahead of time, without a GPU: what a configuration needs is read, and one that cannot ship is caught."""

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed: the extra longattn-kernels[triton]")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel does not compile", allow_module_level=True)

from longattn.kernels.triton.configurations import ARCHITECTURES, TABLE, Configuration
from tools.triton_ahead import Line, compile_line, lines


def test_a_shipped_line_has_no_fault():
    """One of them; `nox -s ahead` compiles all."""
    need = compile_line(Line("forward", "sm_90", 64, 2, TABLE["forward", "sm_90", 64, 2]))
    assert not need.faults and 0 < need.registers <= 255 and 0 < need.shared <= ARCHITECTURES["sm_90"].shared
    assert 0 < need.occupancy <= 1 and "registers" in str(need)


def test_a_planted_spill_is_caught():
    """128 x 128 at head_dim 128 does not fit four warps on Hopper."""
    need = compile_line(Line("forward", "sm_90", 128, 2, Configuration(128, 128, 4, 2)))
    assert need.spilled > 0 and any("spilled to memory" in fault for fault in need.faults)


def test_too_much_shared_memory_is_caught():
    """The compiler itself does not look at the target's limit."""
    need = compile_line(Line("forward", "gfx942", 64, 2, Configuration(256, 256, 8, 3)))
    assert need.shared > ARCHITECTURES["gfx942"].shared
    assert any("shared memory of" in fault for fault in need.faults)


def test_too_much_tensor_memory_is_caught():
    """Nor at that of tensor memory: what comes out then has four registers and does nothing."""
    need = compile_line(Line("backward_keys", "sm_100", 256, 2, Configuration(128, 64, 8, 1)))
    assert any("columns of tensor memory are over the 512" in fault for fault in need.faults)


def test_every_line_is_compiled_by_the_session():
    """The session's list is the table."""
    assert len(lines(list(ARCHITECTURES))) == len(TABLE)
