"""Compiling ahead of time, without a GPU: what a configuration needs is read, and one that cannot ship is caught.

Those that take longest to compile are nightly; the session `ahead` runs them too.
"""

import csv
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: the extra longattn-kernels[triton]")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel does not compile", allow_module_level=True)

from triton import knobs

from longattn.kernels.triton.backward_kernel import keys_kernel
from longattn.kernels.triton.configurations import (
    ARCHITECTURES,
    DENSE,
    HEAD_DIMS,
    KERNELS,
    PAGED,
    TABLE,
    Configuration,
    choose,
    with_terms,
)
from longattn.kernels.triton.query_gradient_kernel import queries_kernel
from tools import triton_ahead
from tools.sass import (
    loads_asynchronously,
    local_accesses,
    loops,
    multiply_adds,
    overwritten_in_flight,
    waits_for_every_product,
)
from tools.triton_ahead import (
    ALONE,
    FORMS,
    NARROW_STRIDES,
    STORED,
    TableLine,
    compile_line,
    in_form,
    lines,
    needed,
    source,
)
from tools.triton_predict import RESULTS, predict


def test_a_shipped_line_has_no_fault():
    """One of them; `nox -s ahead` compiles all."""
    need = compile_line(TableLine("forward", "sm_90", 64, 2, TABLE["forward", "sm_90", 64, 2]))
    assert not need.faults and 0 < need.registers <= 255 and 0 < need.shared <= ARCHITECTURES["sm_90"].shared
    assert 0 < need.occupancy <= 1 and "registers" in str(need)


def test_forms_have_tiles_of_their_own():
    """A call with masks or dropout keeps more beside its scores; all other forms keep the line's tile, but for score terms."""
    line = TableLine("forward", "sm_90", 64, 2, TABLE["forward", "sm_90", 64, 2])
    tiles = {form: in_form(line, form).configuration for form in (*FORMS, NARROW_STRIDES)}
    assert tiles["plain"] == tiles["listed"] == tiles[NARROW_STRIDES] == line.configuration
    assert tiles["masked"] == tiles["dropout"] == tiles["all"] == Configuration(64, 16, 4, 1)
    assert tiles["terms"] == with_terms(line.configuration)
    # The warp-specialised kernel knows two of the other forms: a prior, and strides of 32 bits.
    own = [line for line in lines(["sm_90"], every_form=True) if line.kernel == "dense"]
    assert [line.form for line in own] == ["plain"] * 2 + ["prior"] * 2 + [NARROW_STRIDES] * 2
    # Pages may lie in 8 bits.
    paged = [line.form for line in lines(["sm_90"], every_form=True) if line.kernel == "paged"]
    assert paged == [form for form in ("plain", *STORED) for _ in range(2 * len(HEAD_DIMS) - 1)]
    forms = Counter((line.kernel, line.form) for line in lines(["sm_90"], every_form=True))
    for kernel in KERNELS:
        expected = {*FORMS, NARROW_STRIDES} - {form for form, kernels in ALONE.items() if kernel not in kernels}
        assert {form for of, form in forms if of == kernel} == expected
        assert {forms[kernel, form] for form in expected} == {2 * len(HEAD_DIMS) + 2}
    prior = TableLine("forward", "sm_90", 128, 2, TABLE["forward", "sm_90", 128, 2])
    assert in_form(prior, "prior").configuration == Configuration(128, 64, 8, 2) != prior.configuration
    assert in_form(prior, "listed").configuration == Configuration(128, 64, 8, 2)
    assert in_form(prior, "terms").configuration == Configuration(128, 32, 8, 1)
    # Beside a mask, score terms act on the tile of masks.
    masked = choose("forward", "sm_90", 128, 2, masked=True)[0]
    assert choose("forward", "sm_90", 128, 2, terms=True, masked=True)[0] == with_terms(masked)
    full = TableLine("backward_keys", "sm_80", 64, 4, TABLE["backward_keys", "sm_80", 64, 4])
    assert in_form(full, "all").configuration == Configuration(32, 16, 8, 1) != in_form(full, "prior").configuration


def test_a_form_over_pages_compiles():
    """In 8 bits: products of 16 bits, and no spill in the loop."""
    need = compile_line(TableLine("paged", "sm_90", 64, 2, PAGED[2], form="int8"))
    assert not need.faults, str(need)


def test_what_was_compiled_before_is_not_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Kept by the sources of the kernel and of the scans: a run that was stopped goes on."""
    line = TableLine("forward", "sm_90", 64, 2, TABLE["forward", "sm_90", 64, 2])
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    found = needed(line)
    monkeypatch.setattr(triton_ahead, "compiled", lambda line, flags=None: pytest.fail("compiled again"))
    assert needed(line) == found and not found.faults
    with pytest.raises(pytest.fail.Exception):
        needed(replace(line, configuration=Configuration(128, 64, 8, 2)))


ORDER = """
import sys
from tools.triton_ahead import kept_file, lines
plain = {line.kernel: line for line in lines(["sm_80"])}
print(*sorted(str(kept_file(plain[kernel])) for kernel in sys.argv[1].split()))
"""


def test_what_is_kept_is_found_in_any_order():
    """By processes that begin with another kernel: triton's hash of one depends on which it hashed before."""
    kernels, root = ["forward", "backward_keys", "backward_queries"], Path(triton_ahead.__file__).parents[1]
    files = [
        subprocess.check_output([sys.executable, "-c", ORDER, " ".join(order)], cwd=root, text=True)
        for order in (kernels, kernels[::-1])
    ]
    assert files[0] == files[1] != ""


@pytest.mark.nightly
@pytest.mark.parametrize("form", [form for form in (*FORMS, NARROW_STRIDES) if form != "plain"])
@pytest.mark.parametrize("kernel", ["forward", "backward_keys", "backward_queries"])
def test_forms_compile_without_a_fault(kernel: str, form: str):
    """On Hopper at head_dim 64; `python -m tools.triton_ahead --forms` compiles all lines so."""
    if kernel not in ALONE.get(form, (kernel,)):
        pytest.skip(f"{kernel} has no form {form}")
    need = compile_line(in_form(TableLine(kernel, "sm_90", 64, 2, TABLE[kernel, "sm_90", 64, 2]), form))
    assert not need.faults, str(need)


@pytest.mark.parametrize("kernel", ["forward", "backward_keys", "backward_queries"])
def test_score_terms_compile(kernel):
    """With a cap and a table of distances, whose numbers are gathered."""
    tile = with_terms(TABLE[kernel, "sm_90", 64, 2])
    need = compile_line(TableLine(kernel, "sm_90", 64, 2, tile), {"SOFTCAP": True, "COLUMNS": 258})
    assert not need.faults, str(need)


def test_a_planted_spill_is_caught():
    """128 x 128 at head_dim 128 does not fit four warps on Hopper."""
    need = compile_line(TableLine("forward", "sm_90", 128, 2, Configuration(128, 128, 4, 2)))
    assert need.spilled > 0 and any("of spilled registers in loops of products" in fault for fault in need.faults)


def test_waiting_for_every_product_is_caught():
    """With this tile the compiler waits for each product of the loop before it issues the next."""
    line = TableLine("backward_keys", "sm_90", 128, 2, Configuration(128, 64, 8, 2))
    assert not compile_line(line).faults
    assert any("products of a loop is waited for" in fault for fault in compile_line(line, {"REDUCE": False}).faults)


CODE = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R2, [R4] ;
.L_x_2:
        /*0020*/                   HGMMA.64x64x16.F32 R8, gdesc[UR4] ;
        /*0030*/                   STL [R1], R3 ;
        /*0040*/              @P0  BRA `(.L_x_2) ;
        /*0050*/              @P1  BRA `(.L_x_1) ;
        /*0060*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*0070*/                   EXIT ;
"""


def test_loops_are_read_from_machine_code():
    """The innermost ones: a branch back to a label, with no other such branch between; a branch forward is none."""
    (loop,) = loops(CODE)
    assert [line.split()[0] for line in loop] == ["HGMMA.64x64x16.F32", "STL", "@P0"] and local_accesses(loop) == 1


PRODUCT, WAIT = "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR4].tnspB, R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@pytest.mark.parametrize(
    ("loop", "overwritten"),
    [
        ([PRODUCT, WAIT, "FADD R88, R1, R2"], False),
        ([PRODUCT, "FADD R88, R1, R2", WAIT], True),
        ([PRODUCT, "@P0 LDSM.16.M88.4 R86, [R3]", WAIT], True),
        ([PRODUCT, "STS.128 [R88], R4", WAIT], False),
        # the group before may still run after this wait, its own not
        ([PRODUCT, PRODUCT.replace("R88", "R96"), "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R88, R1", "MOV R96, R1"], True),
        ([PRODUCT, PRODUCT.replace("R88", "R96"), "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R88, R1", WAIT], False),
        ([PRODUCT, "HGMMA.64x64x16.F32.BF16 R80, gdesc[UR4], R80, gsb0", WAIT], True),
    ],
    ids=["waited for", "overwritten", "by a vector", "read alone", "one group waited for", "the other", "by a product"],
)  # fmt: skip
def test_a_register_overwritten_in_flight_is_caught(loop: list[str], overwritten: bool):
    assert bool(overwritten_in_flight(loop)) == overwritten


def test_what_a_turn_leaves_to_the_next_is_caught():
    """Read twice, for the wait stands before the product in the loop."""
    loop = ["MOV R88, R1", WAIT, PRODUCT]
    assert not overwritten_in_flight(loop) and overwritten_in_flight(loop + loop) == ["MOV R88, R1"]


def test_waits_loads_and_multiply_adds_are_read():
    """A planted loop of each fault."""
    assert waits_for_every_product([PRODUCT, WAIT] * 3) == 3 and not waits_for_every_product([PRODUCT] * 3 + [WAIT] * 2)
    assert not waits_for_every_product([PRODUCT, WAIT] * 2)
    assert loads_asynchronously(["@P0 LDGSTS.E.BYPASS.128 [R3], [R4]"]) and not loads_asynchronously(["LDG.E R2, [R4]"])
    assert multiply_adds([PRODUCT, f"@P0 {PRODUCT}", WAIT]) == 2 * 64 * 64 * 16


def test_a_product_made_twice_is_caught(monkeypatch: pytest.MonkeyPatch):
    """Of a kernel that is said to need one product of a tile, the second is one too many."""
    line = TableLine("forward", "sm_90", 64, 2, TABLE["forward", "sm_90", 64, 2])
    monkeypatch.setitem(triton_ahead.PRODUCTS, "forward", 1)
    assert any("take 2 times the multiply-adds" in fault for fault in compile_line(line).faults)


def test_loads_that_are_not_asynchronous_are_caught(monkeypatch: pytest.MonkeyPatch):
    """A tile without stages has no pipeline, whatever its line says."""
    line = TableLine("forward", "sm_90", 64, 2, Configuration(128, 128, 8, 1))
    compiled = triton_ahead.compiled(line)
    staged = replace(line, configuration=Configuration(128, 128, 8, 3))
    faults = triton_ahead._loop_faults(compiled.asm["cubin"], staged, 2)
    assert "3 stages, but a loop's loads are not asynchronous" in faults


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_warp_specialised_kernel_compiles(head_dim: int):
    """Two consumers on Hopper, which load nothing themselves, and no spill in their loops."""
    line = TableLine("dense", "sm_90", head_dim, 2, DENSE["sm_90", head_dim])
    need = compile_line(line)
    assert not need.faults and need.registers == 168, str(need)
    assert triton_ahead.compiled(line).metadata.num_warps == 12


@pytest.mark.parametrize(
    "row",
    list(csv.DictReader(RESULTS.read_text().splitlines())),
    ids=lambda row: f"{row['direction']} {row['head_dim']}",
)
def test_predictions_are_of_the_table_as_it_is(row: dict[str, str]):
    """A changed tile has another prediction: python -m tools.triton_predict --write."""
    found = predict(row["direction"], int(row["head_dim"]))
    assert {name: str(value) for name, value in asdict(found).items()} == {**row, "tflops": str(found.tflops)}
    assert abs(found.tflops - float(row["tflops"])) < 1


@pytest.mark.parametrize(
    ("line", "to_memory"),
    [
        (TableLine("backward_queries", "gfx942", 128, 2, Configuration(64, 64, 4, 1)), False),
        (TableLine("forward", "gfx942", 64, 2, Configuration(128, 64, 8, 1), form="terms"), True),
    ],
    ids=["to accumulation registers", "to memory"],
)
def test_what_amd_calls_spilled_is_memory_alone(line: TableLine, to_memory: bool):
    """Registers that its compiler counts as spilled may lie in accumulation registers; loads and stores of scratch memory are what costs."""
    text = triton_ahead.compiled(line).asm["amdgcn"]
    counted = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
    assert counted is not None and int(counted[1]) > 0
    assert ("scratch_load" in text) == bool(compile_line(line).faults) == to_memory


@pytest.mark.nightly
def test_too_much_shared_memory_is_caught():
    """The compiler itself does not look at the target's limit."""
    need = compile_line(TableLine("forward", "gfx942", 64, 2, Configuration(256, 256, 8, 3)))
    assert need.shared > ARCHITECTURES["gfx942"].shared
    assert any("shared memory of" in fault for fault in need.faults)


@pytest.mark.nightly
def test_too_much_tensor_memory_is_caught():
    """Nor at that of tensor memory: what comes out then has four registers and does nothing."""
    need = compile_line(TableLine("backward_keys", "sm_100", 256, 2, Configuration(128, 64, 8, 1)))
    assert any("columns of tensor memory are over the 512" in fault for fault in need.faults)


def test_a_form_is_the_kernel_that_a_call_launches():
    """A backward of several passes adds to dq, a deterministic one keeps keys from it: four products of a tile are left."""
    queries = TableLine("backward_queries", "sm_90", 64, 2, TABLE["backward_queries", "sm_90", 64, 2], form="prior")
    adds = source(queries).constants[queries_kernel.arg_names.index("ADD"),]
    keys = TableLine("backward_keys", "sm_90", 64, 2, TABLE["backward_keys", "sm_90", 64, 2], form="deterministic")
    reduces = source(keys).constants[keys_kernel.arg_names.index("REDUCE"),]
    assert adds is True and reduces is False


def test_every_line_is_compiled_by_the_session():
    """The session's list is the table, and its widest tiles once more with a narrower v."""
    narrow = sum(head_dim == max(HEAD_DIMS) for _, _, head_dim, _ in TABLE)
    # Pages under float32 queries are read up to head_dim 128.
    paged = len(ARCHITECTURES) * (2 * len(HEAD_DIMS) - 1)
    assert len(lines(list(ARCHITECTURES))) == len(TABLE) + narrow + len(DENSE) + paged
