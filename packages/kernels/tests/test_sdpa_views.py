"""The rows through torch's CUDA kernels. Nothing runs on a GPU here: on meta tensors torch checks how its kernels are called, and stand-ins
on the CPU make numbers, which the oracle checks.

The stand-ins take what the kernels take, refuse what they refuse (widths that are no multiple of 8, rows of a mask that are not aligned,
an lse that is not padded), and are computed in float64 by the book, so nothing of ours is in them.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.tensor  # it reads torch's operators when it is first imported: before stand-ins take their place
from torch import Tensor

from longattn.kernels import attend, explain
from longattn.kernels.dispatch import table as dispatch
from longattn.kernels.dispatch.call import Call
from longattn.kernels.dispatch.environment import TorchAllocator
from longattn.kernels.dispatch.table import row
from longattn.kernels.eager import flash_packages
from longattn.kernels.eager import sdpa_cuda as torch_sdpa_views
from longattn.kernels.testing import Case, check_backend
from longattn.patterncache import BlockSparse, Dilated, Full, Pattern, Rectangle, Restrict, Span, Strided, Window

ROWS = pytest.mark.parametrize("name", ["sdpa_views", "sdpa_views_cudnn"])
ALL_ROWS = pytest.mark.parametrize("name", ["sdpa_views", "sdpa_views_cudnn", "views_fa3", "views_fa4"])


def empty_call(pattern: Pattern, length: int, kv_heads: int) -> Call:
    """A call on tensors without data: torch checks schemas and shapes of its CUDA kernels on them."""
    q, k, v = (torch.empty(2, length, h, 64, device="meta", dtype=torch.float16) for h in (4, kv_heads, kv_heads))
    plan = pattern.plan(Rectangle(4, Span(0, length), Span(0, length)))
    rest: dict[str, Any] = dict.fromkeys(("mask", "bias", "key_padding", "prior"))
    return Call(
        q, k, v, plan, scale=0.125, **rest, dropout_p=0.0, seed=0, out_dtype=torch.float32, deterministic=False,
        allocator=TorchAllocator(),
    )  # fmt: skip


@ROWS
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    "pattern", [Full(), Full(causal=True), Dilated((32, 64), (1, 2), causal=True), Window(20)], ids=str
)
def test_shapes_go_through(name: str, pattern: Pattern, kv_heads: int):
    """Dense, causal and masked tiles reach torch's kernels with arguments that their schemas and shapes take, backward too."""
    call = empty_call(pattern, 70, kv_heads)
    out, lse = row(name).forward(call)
    assert (out.shape, lse.shape, lse.dtype) == (call.q.shape, call.q.shape[:3], torch.float32)
    grads = row(name).backward(call, torch.empty_like(out), None, out, lse, False)
    assert [g.shape for g in grads[:3] if g is not None] == [x.shape for x in (call.q, call.k, call.v)]


@ROWS
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cpu"}, "device=cpu is not in {cuda}"),
        ({"dtype": torch.float32}, "dtype=float32 is not in {float16, bfloat16} on cuda"),
        ({"deterministic": True}, "deterministic=True is not supported on cuda"),
        ({"dropout": True}, "dropout is not supported"),
        ({"value_head_dim": 300}, "value_head_dim=300 is over"),
        ({"architecture": "sm_75"}, "architecture=sm_75 is not in"),
    ],
)
def test_reasons(name: str, options: dict[str, Any], words: str):
    asked: dict[str, Any] = {"dtype": torch.float16, "device": "cuda", **options}
    assert any(words in reason for reason in dict(explain(Full(), (1, 64, 4, 64), **asked).rows)[name])


_LSE_ROWS = 32


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, bias: Tensor | None) -> Tensor:
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias.double()
    if causal:  # top-left, as torch's kernels are where both lengths are equal
        assert q.shape[2] == k.shape[2], "a causal tile is a square"
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores


def _check(widest: int, *tensors: Tensor) -> None:
    for x in tensors:
        assert x.dtype in (torch.float16, torch.bfloat16), x.dtype
        assert x.shape[-1] % 8 == 0 and x.shape[-1] <= widest, f"head_dim={x.shape[-1]}"
        assert x.stride(-1) == 1, "the last axis is contiguous"


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, scale, causal, bias)
    # A row that saw nothing is NaN here, whatever the kernels leave there.
    return (scores.softmax(-1) @ v.double()).to(q.dtype), scores.logsumexp(-1).float()


def _flash(q: Tensor, k: Tensor, v: Tensor, p: float, causal: bool, debug: bool, *, scale: float) -> tuple[Any, ...]:
    _check(256, q, k, v)
    out, lse = _attend(q, k, v, scale, causal, None)
    nothing = torch.empty(0)
    return out, lse, nothing, nothing, q.shape[2], k.shape[2], nothing, nothing, nothing


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, with_lse: bool, p: float, causal: bool, debug: bool, *, scale: float
) -> tuple[Any, ...]:  # fmt: skip
    assert with_lse and bias is None
    _check(128, q, k, v)
    found = _flash(q, k, v, p, causal, debug, scale=scale)
    return found[0], found[1].unsqueeze(-1), *found[2:]


def _aligned(bias: Tensor) -> None:
    assert bias.stride(-1) == 1 and all(step % 8 == 0 for step in bias.stride()[:-1]), "rows of a mask are aligned"


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, with_lse: bool, *, scale: float
) -> tuple[Any, ...]:
    assert with_lse and bias is not None
    _check(1 << 16, q, k, v)
    _aligned(bias)
    out, lse = _attend(q, k, v, scale, False, bias)
    lse = torch.nn.functional.pad(lse, (0, -q.shape[2] % _LSE_ROWS), value=torch.inf)
    return out, lse, torch.empty(0), torch.empty(0)


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p = (_scores(q, k, scale, causal, bias) - lse.double().unsqueeze(-1)).exp()
    go, delta = grad.double(), (grad.double() * out.double()).sum(-1, keepdim=True)
    ds = p * (go @ v.double().transpose(-1, -2) - delta) * scale
    dq, dk, dv = ds @ k.double(), ds.transpose(-1, -2) @ q.double(), p.transpose(-1, -2) @ go
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cum_q: Any, cum_k: Any, nq: int, nk: int,
    p: float, causal: bool, seed: Tensor, offset: Tensor, *, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check(256, grad, q, k, v, out)
    assert lse.is_contiguous() and lse.dtype == torch.float32 and (nq, nk) == (q.shape[2], k.shape[2])
    return _gradients(grad, q, k, v, out, lse, scale, causal, None)


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, seed: Tensor, offset: Tensor,
    p: float, wanted: list[bool], causal: bool = False, *, scale: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    _check(1 << 16, grad, q, k, v, out)
    assert lse.shape[2] % _LSE_ROWS == 0 and list(wanted) == [True, True, True, False]
    if bias is not None:
        _aligned(bias)
    return *_gradients(grad, q, k, v, out, lse[..., : q.shape[2]], scale, causal, bias), torch.empty(0)


def _grouped(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(batch, seq, heads, d) in the order of torch's kernels, k and v for as many heads as q."""
    turned = [x.transpose(1, 2) for x in tensors]
    heads = turned[0].shape[1]
    return tuple(x.repeat_interleave(heads // x.shape[1], 1) for x in turned)


def _package_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    _check(256, q, k, v)
    out, lse = _attend(*_grouped(q, k, v), scale, causal, None)
    return out.transpose(1, 2).contiguous(), lse


def _package_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> list[Tensor]:
    _check(256, grad, q, k, v, out)
    assert lse.is_contiguous() and lse.dtype == torch.float32
    wide = _grouped(q, k, v)
    dq, dk, dv = _gradients(grad.transpose(1, 2), *wide, out.transpose(1, 2), lse, scale, causal, None)
    dk, dv = (x.unflatten(1, (k.shape[2], -1)).sum(2) for x in (dk, dv))
    return [x.transpose(1, 2) for x in (dq, dk, dv)]


def _fa3_module(names: list[str]) -> ModuleType:
    """The functions of flash_attn_interface that take and return an lse, with the parameters of its repository."""

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None,
        seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None,
        rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
        causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        names.append("fa3")
        out, lse = _package_forward(q, k, v, causal, softmax_scale)
        return out, lse, torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None, max_seqlen_q=None,
        max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        names.append("fa3 backward")
        grads = _package_gradients(dout, q, k, v, out, softmax_lse, is_causal, softmax_scale)
        for x, computed in zip((dq, dk, dv), grads, strict=True):
            assert x.is_contiguous()
            x.copy_(computed)
        return torch.empty(0)

    module: Any = ModuleType("flash_attn_interface")
    module._flash_attn_forward, module._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    return module


def _fa4_module(names: list[str]) -> ModuleType:
    """The same of flash_attn.cute.interface."""

    def _flash_attn_fwd(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        softmax_scale=None, causal=False, softcap=None, window_size_left=None, window_size_right=None, learnable_sink=None,
        m_block_size=128, n_block_size=128, num_threads=384, num_splits=1, pack_gqa=None, return_lse=False, out=None, lse=None,
    ):  # fmt: skip
        assert return_lse
        names.append("fa4")
        return _package_forward(q, k, v, causal, softmax_scale)

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None, window_size_right=None,
        cu_seqlens_q=None, cu_seqlens_k=None, deterministic=False,
    ):  # fmt: skip
        names.append("fa4 backward")
        return tuple(x.contiguous() for x in _package_gradients(dout, q, k, v, out, lse, causal, softmax_scale))

    module: Any = ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    return module


_KERNELS = {
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_cudnn_attention": _cudnn,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The rows on CPU tensors, with stand-ins for torch's CUDA kernels; the names of those that were called."""
    names: list[str] = []

    def noting(name: str, function: Any) -> Any:
        return lambda *args, **named: (names.append(name), function(*args, **named))[1]

    for name, function in _KERNELS.items():
        monkeypatch.setattr(torch.ops.aten, name, noting(name, function))
    for modules, member in (
        (torch_sdpa_views, "FLASH"),
        (torch_sdpa_views, "CUDNN"),
        (flash_packages, "FA3"),
        (flash_packages, "FA4"),
    ):
        home: torch_sdpa_views.ViewsRow = getattr(modules, member)
        here = replace(home.CAPABILITY, devices=("cpu",), dtypes={"cpu": (torch.float16, torch.bfloat16)})
        monkeypatch.setattr(modules, member, replace(home, CAPABILITY=here))
    monkeypatch.setattr(flash_packages, "PROBLEMS", {})
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (_fa3_module(names), _fa4_module(names)):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    dispatch.row.cache_clear()
    dispatch.explain_problem.cache_clear()
    yield names
    monkeypatch.undo()
    dispatch.row.cache_clear()
    dispatch.explain_problem.cache_clear()


SMALL = Case(Full(), (70, 70), batch=2, kv_heads=2, group=2, head_dim=16, dtype=torch.float16)


@ALL_ROWS
@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        replace(SMALL, pattern=Full(causal=True), head_dim=20, dtype=torch.bfloat16),
        replace(SMALL, pattern=Window(20, sinks=3), group=1),
        replace(SMALL, pattern=Dilated((32, 64), (1, 2))),
        replace(SMALL, pattern=Dilated((32, 64), (1, 4), heads="blocks", causal=True), prior=True),
        replace(SMALL, pattern=BlockSparse(16, [[(i + j) % 3 != 1 for j in range(5)] for i in range(5)])),
        replace(SMALL, pattern=Restrict(Restrict(Window(9), Dilated((4,), (2,))), Strided(4)), lengths=(20, 20)),
        replace(SMALL, mask="bhqk", padding=True, prior=True, head_dim=40),
        replace(SMALL, mask="+hqk", pattern=Dilated((32,), (2,), causal=True)),
        replace(SMALL, layouts=("strided_dim", "heads_first", "sliced", "expanded_heads", "expanded_dim")),
        replace(SMALL, pattern=Full(causal=True), softmax_scale=-0.5),
        replace(SMALL, lengths=(5, 0), prior=True),
        replace(SMALL, pattern=Full(causal=True), head_dim=24, value_head_dim=16),
        replace(SMALL, pattern=Window(20, sinks=3), head_dim=9, value_head_dim=20),
    ],
    ids=["dense", "odd_width", "window", "longnet", "causal", "blocks", "listed", "masks", "bias", "strides", "negative_scale", "no_keys", "narrow_v",
         "wide_v"],
)  # fmt: skip
def test_numbers(called: list[str], name: str, case: Case):
    """Views, masks, merges and gradients through the merged lse, against the oracle."""
    check_backend(name, case)
    dense = {
        "sdpa_views": "_scaled_dot_product_flash_attention", "sdpa_views_cudnn": "_scaled_dot_product_cudnn_attention",
        "views_fa3": "fa3", "views_fa4": "fa4",
    }  # fmt: skip
    mine = dense.pop(name)
    assert not {*dense.values()} & {*called}
    plain = not (case.mask or case.padding or case.lengths[1] == 0)
    assert (mine in called) == plain or case.softmax_scale == -0.5
    if mine.startswith("fa") and mine in called:
        assert f"{mine} backward" in called


def test_wider_than_flash_with_an_lse_cotangent(called: list[str]):
    """256 columns and the one of an lse cotangent are more than flash's backward takes."""
    check_backend(
        "sdpa_views", replace(SMALL, pattern=Full(causal=True), head_dim=256, lengths=(40, 40), group=1, batch=1)
    )
    assert called[-1] == "_scaled_dot_product_efficient_attention_backward"


def test_packages_serve_plans_that_suit_them(called: list[str]):
    """Dense and causal tiles; a window's strips need masks, which others take better. Named, they serve it all the same."""
    q = torch.randn(1, 64, 2, 16, dtype=torch.float16)
    with torch.no_grad():
        attend(q, q, q, Full(causal=True), deterministic=False)
        assert called == ["fa3"]
        attend(q, q, q, Window(20), backend="views_fa3")
        assert called[1:] == ["_scaled_dot_product_efficient_attention"]
    asked: dict[str, Any] = {"dtype": torch.float16, "device": "cpu"}
    assert explain(Full(), (1, 64, 2, 16), **asked).backend == "views_fa3"
    assert explain(Window(20), (1, 64, 2, 16), **asked).backend == "sdpa_views"


def test_a_package_of_another_version_is_refused(called: list[str], monkeypatch: pytest.MonkeyPatch):
    """Its parameters are compared, and the next row serves; without a package the reason says so."""
    module: Any = ModuleType("flash_attn_interface")
    module._flash_attn_forward, module._flash_attn_backward = (lambda q, k, v: None), (lambda dout: None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    q = torch.randn(1, 64, 2, 16, dtype=torch.float16)
    with torch.no_grad():
        attend(q, q, q, Full(), deterministic=False)
        assert called == ["fa4"]
        with pytest.raises(
            ValueError, match="_flash_attn_forward of flash_attn_interface takes no softmax_scale, causal"
        ):
            attend(q, q, q, Full(), backend="views_fa3")
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    assert row("views_fa3").refusal() == "flash_attn_interface is not installed"  # type: ignore[misc]
