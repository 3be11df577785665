"""Decode steps over pages against the float64 oracle: the native kernel, torch's products, and the Triton kernel in its interpreter."""

import itertools
import os
from collections.abc import Callable

import pytest
import torch

from longattn.kernels import paging, reference_attention
from longattn.kernels.native import building
from longattn.kernels.native import paged as native
from longattn.kernels.native.cpu import levels
from longattn.kernels.pages import PagedCache
from longattn.kernels.paging import paged_attention
from longattn.kernels.triton import row as triton

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
EIGHT_BITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
PAGE = 8


def stored(x, dtype):
    """Pages of x as they lie in `dtype`, with scales for 8 bits."""
    if dtype not in EIGHT_BITS:
        return x.to(dtype), None
    scales = x.abs().amax(-1) / EIGHT_BITS[dtype]
    numbers = x / scales[..., None]
    return (numbers.round().to(dtype) if dtype == torch.int8 else numbers.to(dtype)), scales


def made(batch, heads, group, held, dim, value_dim, dtype, lies, seed=0):
    """q, a cache, a table of pages, and what is added: hidden slots hold NaN, and pages that nobody sees are -1."""
    generator = torch.Generator().manual_seed(seed)
    pages = -(-held // PAGE)
    q = torch.randn((batch, heads, group, dim), generator=generator).to(dtype)
    (keys, key_scales), (values, value_scales) = (
        stored(torch.randn((batch * heads * pages + 3, PAGE, d), generator=generator), lies) for d in (dim, value_dim)
    )
    table = torch.randperm(len(keys), generator=generator)[: batch * heads * pages].reshape(batch, heads, pages).int()
    added = torch.randn((batch, heads, group, held), generator=generator)
    hidden = torch.rand((batch, heads, 1, held), generator=generator) < 0.3
    hidden[0, 0, :, PAGE : 2 * PAGE] = True
    added = added.masked_fill(hidden | (torch.rand(added.shape, generator=generator) < 0.1), -torch.inf)
    if pages > 2:
        table[0, 0, 1] = -1
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return q, PagedCache(keys, values, key_scales, value_scales), table, added.to(wide)


def oracle(q, cache, table, held, scale, added):
    """In float64, over the dequantised numbers."""
    keys, values = cache.gathered(table, held, torch.float64)
    hidden = (added == -torch.inf).all(2)[..., None]
    keys, values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
    flat = [x.double().flatten(0, 1) for x in (q, keys, values)]
    counts = torch.ones(len(flat[0]), q.shape[2], 1, held, dtype=torch.float64)
    bias = added.double().flatten(0, 1)[:, :, None]
    parts = reference_attention(flat[0][:, None], flat[1][:, :, None], flat[2][:, :, None], counts, scale, bias=bias)
    return parts.out.reshape(*q.shape[:3], -1), parts.lse.reshape(q.shape[:3])


def check(q, cache, table, added, out_dtype=None):
    held = added.shape[-1]
    got = paged_attention(q, cache, table, held, 0.3, added, out_dtype)
    out, lse = oracle(q, cache, table, held, 0.3, added)
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(got.out.double(), out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got.lse.double(), lse, atol=tolerance, rtol=tolerance)
    return got


KINDS = [*((dtype, dtype) for dtype in TOLERANCE), *itertools.product(list(TOLERANCE)[1:], EIGHT_BITS)]


@pytest.fixture(params=[*levels(), "torch"] if not INSIDE else ["triton"])
def served_by(request, monkeypatch):
    """Each that serves, alone: the library's forms, torch, triton."""
    if request.param not in levels():
        monkeypatch.setattr(paging.native, "refusals", lambda *_: ["not asked"])
        return request.param
    monkeypatch.setenv("LONGATTN_NATIVE", request.param)
    if building.refusal() is not None:
        pytest.skip(str(building.refusal()))
    return "native"


@pytest.mark.parametrize(("dtype", "lies"), KINDS, ids=str)
def test_every_dtype_and_size(served_by, dtype, lies):
    """Groups beside a task's rows, odd head sizes, lengths beside tiles and ranges; hidden slots reach nothing."""
    sizes = [(2, 3, 1, 64, 64, 70), (1, 2, 5, 33, 20, 9), (2, 1, 18, 16, 40, 1)]
    for batch, heads, group, dim, value_dim, held in sizes + ([] if INSIDE else [(1, 2, 4, 64, 64, 2500)]):
        q, cache, table, added = made(batch, heads, group, held, dim, value_dim, dtype, lies)
        check(q, cache, table, added)
        assert served_by == ("native" if not native.refusals(cache, q) else served_by)


@pytest.mark.usefixtures("served_by")
def test_what_is_added_may_be_shared_and_nothing_may_be_seen():
    """One mask for all rows of the batch and heads; a query that sees nothing, and no slots at all, give zero and -inf."""
    q, cache, table, added = made(3, 2, 2, 40, 16, 16, torch.float32, torch.int8)
    check(q, cache, table.clamp(min=0), added[:1, :1].clone().expand(3, 2, 2, 40), torch.float32)
    added[1] = -torch.inf
    got = check(q, cache, table, added)
    assert not got.out[1].any() and (got.lse[1] == -torch.inf).all()
    got = paged_attention(q, cache, table, 0, 1.0, added[..., :0])
    assert not got.out.any() and (got.lse == -torch.inf).all()


def test_what_does_not_fit_is_named():
    """Pages, scales, numbers of slots and what is added."""
    q, cache, table, added = made(1, 2, 2, 16, 16, 16, torch.float32, torch.int8)
    with pytest.raises(ValueError, match="key_scales must be a tensor for 8 bits"):
        PagedCache(cache.keys, cache.values)
    with pytest.raises(ValueError, match="key_scales must be contiguous float32"):
        PagedCache(cache.keys, cache.values, torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="power of two slots, got 3"):
        PagedCache(torch.ones(2, 3, 4), torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="values must be contiguous"):
        PagedCache(torch.ones(2, 4, 4), torch.ones(2, 8, 4))
    with pytest.raises(ValueError, match="held must be from 0 to 16, the slots of pages, got 17"):
        paged_attention(q, cache, table, 17, 1.0, added)
    with pytest.raises(ValueError, match="pages must be int32"):
        paged_attention(q, cache, table.long(), 16, 1.0, added)
    with pytest.raises(ValueError, match=r"added must be torch.float32 on cpu"):
        paged_attention(q, cache, table, 16, 1.0, added.double())


if not INSIDE:

    def test_the_triton_kernel_in_a_process_of_its_own(in_the_interpreter: Callable[[], None]):
        """The cases above, where triton was imported to interpret."""
        pytest.importorskip("triton", reason="triton is not installed: the extra longattn-kernels[triton]")
        in_the_interpreter()

else:

    def test_triton_serves_here():
        """So the cases are its own."""
        q, cache, *_ = made(1, 2, 2, 16, 16, 16, torch.float32, torch.int8)
        assert triton.serves_pages(cache, q)
