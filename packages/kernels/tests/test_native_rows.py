"""The native row beyond what every row is held to: its narrower forms, its specialised sizes, its two ways back, its bits."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longattn.kernels import Environment, attend
from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.table import row
from longattn.kernels.native.building import refusal
from longattn.kernels.native.cpu import levels
from longattn.kernels.native.row import _key_parts
from longattn.kernels.poison import poisoned_memory
from longattn.kernels.testing import Case, Tensors, cases, check_backend, run_case
from longattn.patterncache import BlockSparse, Dilated, Full, Rectangle, Restrict, Span, Strided, Window

pytestmark = pytest.mark.skipif(refusal() is not None, reason=str(refusal()))

LONGNET = Dilated((8, 16, 32), (1, 2, 4), causal=True)
LISTED = Restrict(Restrict(Window(9), Dilated((4,), (2,))), Strided(4))
DTYPES = row("native").capability.dtypes_on("cpu")
NARROWER = levels()[1:]


@pytest.fixture(params=NARROWER)
def level(request: pytest.FixtureRequest, native_level: Callable[[str], str]) -> str:
    """Each form of the library that this machine would not choose by itself."""
    return native_level(request.param)


@pytest.fixture
def threads() -> object:
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 7, 32, 64, 72, 96, 128, 200, 256])
def test_a_forced_level_on_any_head_dim(dtype: torch.dtype, head_dim: int):
    check_backend("native", Case(LONGNET, (41, 45), group=2, head_dim=head_dim, dtype=dtype))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
def test_a_forced_level_on_any_call(dtype: torch.dtype, data: st.DataObject):
    check_backend("native", data.draw(cases(dtype)))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(
    "case",
    [
        Case(LONGNET, (300, 300), batch=1, dropout_p=0.3),
        Case(LISTED, (40, 40), padding=True, mask="+bhqk", prior=True),
        Case(Full(causal=True), (130, 700), batch=1, softmax_scale=40.0),
    ],
    ids=lambda case: str(case.pattern),
)
def test_a_forced_level_with_everything(case: Case):
    check_backend("native", case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 31, 32, 33, 64, 96, 100, 128, 192, 256])
@pytest.mark.parametrize("length", [1, 5, 6, 7, 95, 97, 255, 257])
def test_lengths_beside_the_tiles(dtype: torch.dtype, head_dim: int, length: int):
    """One more and one fewer than rows of a register tile, of a strip, keys of a tile."""
    check_backend("native", Case(Full(causal=length % 2 == 0), (length, 300), batch=1, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "pattern",
    [
        Window(1),
        Window(5),
        Window(17, causal=False),
        Window(64, sinks=3),
        Window(250),
        Restrict(Window(40), Dilated((64, 512), (1, 8), causal=True)),
        BlockSparse(10, torch.eye(62).bool()),
    ],
    ids=str,
)
def test_narrow_bands(pattern, dtype: torch.dtype):
    """Register tiles of rows meet a part of a tile of keys, or nothing of it, forward and back."""
    check_backend("native", Case(pattern, (620, 620), batch=1, kv_heads=1, dtype=dtype))
    check_backend(
        "native", Case(pattern, (101, 620), batch=1, kv_heads=1, padding=True, dropout_p=0.1, mask="+bhqk", dtype=dtype)
    )


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case(Window(30), (333, 333), group=2, head_dim=64),
        Case(Window(9, causal=False), (77, 290), padding=True, head_dim=20),
        Case(Restrict(Window(50), Dilated((64,), (2,))), (130, 130), prior=True),
    ],
    ids=lambda case: str(case.pattern),
)
def test_a_forced_level_on_narrow_bands(case: Case, dtype: torch.dtype):
    check_backend("native", replace(case, dtype=dtype))


def test_positions_far_apart():
    """Of keys in one tile: beyond what 32 bits hold."""
    far = Span(0, 40, 2**33)
    q, k, v = (torch.randn(1, 40, 2, 8) for _ in range(3))
    state = attend(q, k, v, Full(causal=True), q_spans=far, k_spans=far, backend="native")
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)  # pyright: ignore[reportArgumentType]
    assert torch.allclose(state.out, expected, atol=1e-5)


@pytest.mark.parametrize("many", [1, 2, 3, 8])
@pytest.mark.parametrize("pattern", [Full(causal=True), LONGNET, LISTED, LISTED + LONGNET, Window(7, sinks=3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ways_back(many: int, pattern, dtype: torch.dtype, threads):
    """One owner for everything of a kv head, or ranges of keys where there are more threads than heads; then dq apart."""
    threads(many)
    check_backend("native", Case(pattern, (90, 100), batch=1, kv_heads=1, group=2, dtype=dtype, prior=True))
    check_backend("native", Case(pattern, (60, 60), batch=2, kv_heads=3, dtype=dtype, padding=True, dropout_p=0.2))


@pytest.mark.parametrize(
    ("owners", "many", "one"), [(8, 2, True), (1, 2, False), (3, 2, True), (5, 4, False), (16, 5, True)]
)
def test_which_way_back(owners: int, many: int, one: bool):
    """Two passes make 7 / 5 of the products: worth it where more than 2 / 7 of the threads would wait."""

    class Asked:
        batch, kv_heads, threads, keys = 1, owners, many, 1000

    assert (_key_parts(Asked) == 1) == one  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals(dtype: torch.dtype):
    """Numbers at the lower end neither trap nor become NaN; scores of them are zero, and v comes through."""
    tiny = torch.finfo(dtype).tiny / 4
    q = torch.full((1, 40, 2, 8), tiny, dtype=dtype)
    v = torch.linspace(0, 1, 40, dtype=dtype)[None, :, None, None].expand(1, 40, 2, 8)
    state = attend(q, q, v, Full(), backend="native")
    assert torch.allclose(state.out, v.float().mean(1, keepdim=True).expand_as(state.out), atol=1e-2)
    small = attend(q, q, q, Full(), backend="native").out
    assert small.isfinite().all() and (small >= 0).all() and (small <= 4 * tiny).all()


@pytest.fixture
def flushing() -> object:
    """Sets whether torch's threads flush denormals, and puts it back."""
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("flush", [False, True])
def test_float16_denormals_keep_their_value(
    level: str, rows: int, flush: bool, flushing, monkeypatch: pytest.MonkeyPatch
):
    """As q, k, v and gradients, read and written, in short and long calls: they are ordinary float32."""
    monkeypatch.setenv("LONGATTN_NATIVE", level)
    small = torch.tensor([2.0**-24, 3 * 2.0**-24, -(2.0**-20), 2.0**-14 - 2.0**-24]).half()
    v = small.repeat(2).expand(1, 100, 2, 8).contiguous()
    big = torch.full((1, 100, 2, 8), 2.0**14).half()
    lonely = torch.zeros(1, 100, 2, 8).half()
    lonely[:, 1] = 2.0**-16
    flushing(flush)
    for q, k in ((big, lonely), (lonely, big)):
        q = q[:, :rows].clone().requires_grad_()
        weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q.double(), k.double()), -1)  # scale 1
        state = attend(q, k, v, Full(), backend="native", softmax_scale=1.0)
        assert torch.allclose(
            state.lse.double(), torch.einsum("bihd,bjhd->bihj", q.double(), k.double()).logsumexp(-1), atol=1e-5
        )
        assert torch.allclose(
            state.out.double(), torch.einsum("bhij,bjhd->bihd", weights, v.double()), rtol=1e-5, atol=0
        )
    stored = attend(q.detach(), k, v, Full(), backend="native", out_dtype=torch.float16).out
    assert torch.equal(stored, v[:, :rows])
    k, v = lonely.clone().requires_grad_(), v.clone().requires_grad_()
    attend(q.detach(), k, v, Full(), backend="native", out_dtype=torch.float16).out.backward(v.detach()[:, :rows])
    assert v.grad is not None
    assert torch.allclose(v.grad.double(), v.detach().double() * rows / 100, rtol=1e-2, atol=2.0**-25)


@pytest.mark.parametrize("level", levels())
def test_float32_denormals_are_read(level: str, monkeypatch: pytest.MonkeyPatch):
    """As q or k beside numbers that make a score of them, whatever the scale; what is computed may be flushed, inputs are not."""
    monkeypatch.setenv("LONGATTN_NATIVE", level)
    tiny, huge = torch.zeros(1, 100, 1, 8), torch.full((1, 100, 1, 8), 2.0**126)
    tiny[:, 1] = 2.0**-128
    v = torch.randn(1, 100, 1, 8)
    for q, k in ((tiny, huge), (huge, tiny)):
        scores = torch.einsum("bihd,bjhd->bihj", q.double(), k.double()) * 8**-0.5
        state = attend(q, k, v, Full(), backend="native")
        assert torch.allclose(state.lse.double(), scores.logsumexp(-1), atol=1e-5)
        assert attend(q[:, :2], k, v, Full(), backend="native").lse.allclose(state.lse[:, :2], atol=1e-5)


@pytest.mark.parametrize("many", [1, 3])
@pytest.mark.parametrize("flush", [False, True])
def test_denormals_of_others_are_as_before(many: int, flush: bool, threads, flushing):
    """The thread's setting outlives forward, backward and short calls, either way; and no bit of ours depends on it."""
    threads(many)
    q = torch.randn(1, 100, 2, 8).requires_grad_()
    bits = [attend(q, q, q, Full(), backend="native").out]
    flushing(flush)
    tiny = torch.full((1000,), 1e-40)
    before = tiny * 0.5
    assert bool(before.any()) != flush
    out = attend(q, q, q, Full(), backend="native").out
    assert torch.equal(tiny * 0.5, before)
    out.sum().backward()
    assert torch.equal(tiny * 0.5, before)
    with torch.no_grad():
        attend(q[:, :1], q, q, Full(), backend="native")
    assert torch.equal(tiny * 0.5, before) and torch.equal(bits[0], out)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [9, 100])
def test_nan_in_a_key_reaches_who_sees_it(level: str, dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch):
    """It is not taken for a key of weight zero; rows before it are as they were."""
    monkeypatch.setenv("LONGATTN_NATIVE", level)
    q, k, v = torch.randn(3, 1, length, 2, 16).to(dtype)
    k[0, 7, 1, 5] = torch.nan
    state = attend(q, k, v, Full(causal=True), backend="native")
    seen = state.out.isnan()
    assert seen[0, 7:, 1].all() and not seen[0, :7].any() and not seen[0, :, 0].any()
    assert torch.equal(state.lse.isnan(), seen.all(-1))


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 3.0, 40.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_from_nothing_to_huge(scale: float, dtype: torch.dtype):
    """What is a power of two of the scale moves into q, exactly."""
    for sign in (1, -1):
        check_backend("native", Case(LONGNET, (40, 40), softmax_scale=sign * scale, dtype=dtype, mask="+k"))


@pytest.mark.parametrize("pattern", [Full(), LONGNET, LISTED + LONGNET, BlockSparse(16, torch.eye(20).bool())], ids=str)
@pytest.mark.parametrize("many", [1, 2, 3])
def test_same_input_and_threads_same_bits(pattern, many: int, threads):
    """Forward and backward, over and over, whoever else is busy; and forward for any number of threads."""
    threads(many)
    case = Case(pattern, (320, 320), batch=1, kv_heads=2, group=2, head_dim=32)
    outs = []
    for _ in range(4):
        data = case.tensors()
        inputs = [x.requires_grad_() for x in (data.q, data.k, data.v)]
        state = run_case(case, replace(data, q=inputs[0], k=inputs[1], v=inputs[2]), backend="native")
        outs.append((state.out, state.lse, *torch.autograd.grad(state.out, inputs, data.grad_out)))
    assert all(torch.equal(a, b) for other in outs[1:] for a, b in zip(outs[0], other, strict=True))
    threads(1)
    alone = run_case(case, case.tensors(), backend="native")
    assert torch.equal(alone.out, outs[0][0]) and torch.equal(alone.lse, outs[0][1])


def poisoned(data: Tensors) -> Tensors:
    """k and v whose rows lie in memory full of NaN: whoever reads beyond a row meets one."""

    def inside(x: torch.Tensor) -> torch.Tensor:
        room = torch.full((x.shape[0], x.shape[1] + 2, x.shape[2] + 2, x.shape[3] + 3), torch.nan, dtype=x.dtype)
        room[:, 1:-1, 1:-1, 1:-2] = x
        return room[:, 1:-1, 1:-1, 1:-2]

    return replace(data, q=inside(data.q), k=inside(data.k), v=inside(data.v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [5, 64, 100])
def test_nothing_beside_a_row_is_read_as_a_number(dtype: torch.dtype, head_dim: int):
    """Rows surrounded by NaN, and scratch full of NaN: same bits."""
    case = Case(LONGNET, (50, 70), head_dim=head_dim, dtype=dtype)
    data = case.tensors()
    with poisoned_memory():
        state = run_case(case, poisoned(data), backend="native")
    plain = run_case(case, data, backend="native")
    assert torch.equal(state.out, plain.out) and torch.equal(state.lse, plain.lse)


class Counting:
    """Hands out memory full of NaN, and keeps what for."""

    def __init__(self) -> None:
        self.bytes: list[tuple[str, int]] = []

    def empty(self, shape, dtype, device, role):
        poisoned = torch.full(tuple(shape), torch.nan, dtype=dtype, device=device)
        self.bytes.append((role, poisoned.nbytes))
        return poisoned

    def release(self, tensor, role):
        self.bytes.append((f"back {role}", tensor.nbytes))


@pytest.mark.parametrize("pattern", [Full(causal=True), Dilated((512, 1024), (1, 2))], ids=str)
def test_working_memory_is_a_tile(pattern, threads):
    """However long the sequence: beside out and lse the allocator is asked for a fixed amount a thread, and gets it back."""
    threads(1)
    sizes = []
    for n in (2048, 8192):
        allocator = Counting()
        q = torch.randn(1, n, 1, 64)
        attend(q, q, q, pattern, backend="native", environment=Environment(allocator=allocator))
        (scratch,) = [size for role, size in allocator.bytes if role == "back temp"]
        assert sorted(size for _, size in allocator.bytes) == sorted([n * 256, n * 4, scratch, scratch])
        sizes.append(scratch)
    assert sizes[0] == sizes[1] <= 2 << 20


@pytest.mark.parametrize("pattern", [Dilated((256, 512), (1, 2)), Window(64)], ids=str)
def test_sums_of_a_backward_do_not_grow(pattern, threads):
    """In half precision: however long the sequence, a thread's float32 sums hold the keys that coming tasks meet."""
    threads(1)
    sizes = []
    for n in (2048, 8192):
        plan = pattern.plan(Rectangle(2, Span(0, n), Span(0, n)))
        allocator = Counting()
        q, k, v, grad = torch.randn(4, 1, n, 2, 16).bfloat16()
        call = Call(q, k, v, plan, 0.25, None, None, None, None, 0.0, 0, torch.bfloat16, False, allocator)
        out, lse = row("native").forward(call)
        allocator.bytes.clear()
        row("native").backward(call, grad, None, out, lse, False)
        sizes.append(max(size for _, size in allocator.bytes))
    assert sizes[0] == sizes[1]


def test_a_single_rounding_where_nothing_merges():
    """bfloat16 results are stored as such: the same as rounding the float32 state."""
    q, k, v = torch.randn(3, 1, 70, 2, 64).bfloat16()
    state = attend(q, k, v, LONGNET, backend="native")
    direct = attend(q, k, v, LONGNET, backend="native", out_dtype=torch.bfloat16)
    assert torch.equal(direct.out, state.out.bfloat16()) and torch.equal(direct.lse, state.lse)
