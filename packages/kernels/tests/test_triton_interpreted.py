"""The Triton kernels in triton's interpreter, on CPU tensors, against the oracle: outputs, lse and gradients.

The interpreter is chosen by an environment variable before triton is imported, so the cases run in a process of their own: here, one
test starts it; there, this same file is the suite. Tiles are 64 x 64, the least at which kernels run as on a device.
"""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from longattn.kernels import AttentionState, attend, explain, merge
from longattn.kernels.decoding import _products as products
from longattn.kernels.dispatch.call import GradientPart
from longattn.kernels.dispatch.environment import find_environment
from longattn.kernels.dispatch.table import row
from longattn.kernels.ops.arguments import Cotangents, OpArguments, OpTensors
from longattn.kernels.ops.attend_op import attend_rectangle, rectangle_gradients
from longattn.kernels.state import minus_delta_of
from longattn.kernels.testing import Case, assert_near, check_backend, expect_case, run_case
from longattn.kernels.triton import configurations, paged_check, self_check
from longattn.kernels.triton.cached_step import TritonCache
from longattn.kernels.triton.row import attend_pages
from longattn.patterncache import BlockSparse, Dilated, Full, Pattern, Restrict, Span, Strided, Window

pytest.importorskip("triton", reason="triton is not installed: the extra longattn-kernels[triton]")

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"

LONGNET = Dilated((64, 128), (1, 2))
BLOCKS = BlockSparse(32, [[(i + j) % 3 != 0 for j in range(5)] for i in range(5)])
LISTED = Restrict(Restrict(Window(9), Dilated((4,), (2,))), Strided(4))
HALF, BRAIN = torch.float16, torch.bfloat16


class Recorder(TorchDispatchMode):
    """Every operation of torch, those inside our ops included, and the calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        if func.namespace != "longattn":
            return func(*args, **(kwargs or {}))
        self.calls.append((func, args))
        with self:
            return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))


if not INSIDE:

    def test_in_a_process_of_its_own(in_the_interpreter: Callable[[], None]):
        """Every case below, where triton was imported to interpret."""
        in_the_interpreter()

else:
    SMALL = Case(LONGNET, (70, 70), batch=1, kv_heads=1, group=2, head_dim=16)

    @pytest.mark.parametrize(
        "case",
        [
            replace(SMALL, pattern=Full(), lengths=(128, 128), dtype=HALF),
            replace(SMALL, pattern=Full(causal=True), lengths=(150, 260), dtype=BRAIN, prior=True),
            replace(SMALL, pattern=Dilated((128, 256), (1, 2)), lengths=(256, 256), dtype=HALF, kv_heads=2, group=1),
            replace(SMALL, pattern=Dilated((512,), (2,), causal=True), lengths=(512, 512), dtype=HALF, group=1),
        ],
        ids=["one launch", "a state is handed on", "steps of 1 and 2 and two heads", "causal rows two apart"],
    )  # fmt: skip
    def test_dense_tiles(case: Case, monkeypatch: pytest.MonkeyPatch):
        """The warp-specialised kernel, which the interpreter runs as any other, and the rest onto which it merges."""
        from longattn.kernels.triton import forward_form, launch_forward

        found: list[str] = []
        monkeypatch.setattr(forward_form, "is_dense", lambda call: True)
        run = launch_forward.run
        monkeypatch.setattr(
            launch_forward, "run", lambda kernel, *rest, **named: (found.append(kernel.fn.__name__), run(kernel, *rest, **named))
        )  # fmt: skip
        check_backend("triton", case)
        assert "dense_kernel" in found and ("forward_kernel" in found) == (case.lengths != (128, 128))

    @pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
    @pytest.mark.parametrize(
        ("pattern", "dtype"),
        [(Full(), torch.float32), (Full(causal=True), HALF), (Window(40, sinks=5, causal=False), torch.float32),
         (LONGNET, HALF), (LONGNET.with_causal(True), torch.float32), (BLOCKS, BRAIN)],
        ids=str,
    )  # fmt: skip
    def test_patterns(pattern: Pattern, dtype: torch.dtype, deterministic: bool):
        """Dense, causal, window with sinks, dilated in one launch and branch by branch, lists of blocks; grouped heads, ragged ends."""
        torch.use_deterministic_algorithms(deterministic)
        check_backend(
            "triton",
            replace(SMALL, pattern=pattern, dtype=dtype, lengths=(130, 130) if pattern is BLOCKS else (70, 70)),
        )
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize(
        "case",
        [
            replace(SMALL, prior=True, mask="bhqk", padding=True, head_dim=40),
            replace(SMALL, pattern=Full(causal=True), mask="+hq", dropout_p=0.3, shard=(3, 8)),
            replace(SMALL, pattern=Window(30), layouts=("strided_dim", "heads_first", "sliced", "plain", "expanded_dim")),
            replace(SMALL, pattern=LONGNET, layouts=("unfolded", "unfolded_heads", "unfolded", "plain", "expanded_seq")),
            replace(SMALL, softmax_scale=-0.5, batch=2, dtype=HALF, prior=True),
            replace(SMALL, softmax_scale=0.0, mask="k", pattern=Full(causal=True)),
            replace(SMALL, softmax_scale=40.0, pattern=Full()),
            replace(SMALL, pattern=LISTED, lengths=(12, 12), padding=True),
            replace(SMALL, pattern=Dilated((16,), (1,)), lengths=(20, 12), q_spans=(Span(0, 20),), k_spans=(Span(8, 12),), prior=True),
            replace(SMALL, head_dim=24, value_head_dim=16, pattern=Full(causal=True), mask="+hq", prior=True),
            replace(SMALL, head_dim=8, value_head_dim=40, padding=True, dtype=HALF, dropout_p=0.3),
            replace(SMALL, lengths=(0, 5), pattern=Full()),
            replace(SMALL, lengths=(4, 0), pattern=Full(), prior=True),
            replace(SMALL, batch=0),
            replace(SMALL, pattern=Full(causal=True), terms=("softcap",), softmax_scale=-0.5),
            replace(SMALL, pattern=LONGNET, terms=("softcap", "alibi", "relative"), mask="+hq", padding=True),
            replace(SMALL, terms=("causal_relative",), lengths=(5, 70), kv_heads=2, dtype=HALF, pattern=Window(30)),
            replace(SMALL, terms=("alibi",), lengths=(12, 12), pattern=LISTED, prior=True),
        ],
        ids=["masks", "bias_dropout", "strides", "shared_memory", "negative_scale", "zero_scale", "huge_logits", "listed", "blind_rows",
             "narrow_v", "wide_v", "no_queries", "no_keys", "no_batch", "softcap", "all_terms", "packed_terms", "listed_terms"],
    )  # fmt: skip
    def test_calls(case: Case):
        """Masks, bias, padding, dropout, priors, strides, scales, rows that see nothing, and nothing at all."""
        check_backend("triton", case)

    def test_a_finite_bias_hides_nothing():
        """Rows of finfo.min alone, beside -inf and beside ordinary numbers, with gradients; the kernel by itself keeps lse a number."""
        from longattn.kernels.triton import row as triton_row

        case = replace(SMALL, pattern=LONGNET.with_causal(True), lengths=(40, 40))
        for dtype in (torch.float32, torch.float64):
            bias = torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
            low = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).min
            bias[3], bias[7], bias[7, 5:9], bias[12, :10] = low, -torch.inf, low, low
            found = []
            for compute, options in ((run_case, {"backend": "triton"}), (expect_case, {})):
                data = replace(case.tensors(), mask=bias)
                q, k, v = (x.requires_grad_() for x in (data.q, data.k, data.v))
                state = compute(case, data, **options)
                grads = torch.autograd.grad(state.out, (q, k, v), data.grad_out.to(state.out.dtype))
                found.append((state.out.detach(), state.lse.detach(), *grads))
            for got, expected in zip(*found, strict=True):
                assert_near(got, expected, 1e-4, 1e-4, str(dtype))
        seen: list[torch.Tensor] = []
        bare = triton_row.forward.__wrapped__  # type: ignore[attr-defined]
        data = replace(case.tensors(), mask=torch.full((40, 40), torch.finfo(torch.float32).min))
        dispatch_row = row("triton")
        object.__setattr__(dispatch_row, "forward", lambda call: (seen.append(bare(call)[1]), bare(call))[1])
        try:
            run_case(case, data, backend="triton")
        finally:
            object.__setattr__(dispatch_row, "forward", triton_row.forward)
        assert seen[0].isfinite().all()

    @pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
    def test_head_dim_in_chunks(monkeypatch: pytest.MonkeyPatch, deterministic: bool):
        """Where whole tiles would spill, products over head_dim take some columns at a time: every kernel, a width that chunks do not divide."""
        monkeypatch.setattr(configurations, "_INTERPRETED", configurations.Configuration(64, 64, 4, 1, chunk=16))
        case = replace(SMALL, head_dim=40, padding=True, softmax_scale=-0.3, layouts=("strided_dim",) * 5)
        torch.use_deterministic_algorithms(deterministic)
        check_backend("triton", case)
        check_backend("triton", replace(case, value_head_dim=20))
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("dtype", [torch.float32, BRAIN])
    @pytest.mark.parametrize("queries", [1, 3])
    def test_decode_splits_keys(dtype: torch.dtype, queries: int):
        """Few queries, many keys: heads that share a kv head are one tile, keys are split over programs, and partial states merge."""
        from longattn.kernels.triton import launch_forward as launch

        case = replace(SMALL, lengths=(queries, 400), pattern=Full(causal=True), dtype=dtype, prior=True, padding=True)
        case = replace(case, value_head_dim=16 if queries == 1 else 9)
        seen = []
        made = launch.merge_launch
        launch.merge_launch = lambda *a: (seen.append(a[0].shape[0]), made(*a))[1]
        try:
            with torch.no_grad():
                check = run_case(case, case.tensors(), backend="triton")
        finally:
            launch.merge_launch = made
        expected = expect_case(case, case.tensors())
        atol, rtol = row("triton").capability.tolerance[dtype]
        assert seen == [3]
        assert_near(check.out, expected.out, atol, rtol, "out")
        assert_near(check.lse, expected.lse, atol, rtol, "lse")

    def test_a_ring_read_as_it_lies():
        """A full ring has no order: decoding over rotated slots is the same attention."""
        q, k, v = (torch.randn(1, n, 2, 16) for n in (1, 300, 300))
        expected = attend(q, k, v, Full(), backend="triton")
        got = attend(q, *(x.roll(77, 1) for x in (k, v)), Full(), backend="triton")
        torch.testing.assert_close(expected.out, got.out)

    def test_equal_bits_when_deterministic():
        """Gradients too."""
        data = replace(SMALL, pattern=LONGNET.with_causal(True)).tensors()
        found = []
        for _ in range(2):
            q, k, v = (x.clone().requires_grad_() for x in (data.q, data.k, data.v))
            attend(
                q, k, v, LONGNET.with_causal(True), backend="triton", deterministic=True
            ).out.square().sum().backward()
            found.append((q.grad, k.grad, v.grad))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def test_the_merge_kernel_merges_like_merge():
        """Any number of parts, and rows that saw nothing, whose memory was never written."""
        from longattn.kernels.triton.launch_forward import merge_launch, run

        out, lse = torch.randn(3, 1, 5, 2, 24), torch.randn(3, 1, 5, 2)
        lse[1, :, 2:] = lse[:, :, 4] = -torch.inf
        expected = AttentionState.empty(out[0])
        for a, b in zip(out * (lse > -torch.inf).unsqueeze(-1), lse, strict=True):
            expected = merge(expected, AttentionState(a, b))
        out[(lse == -torch.inf)] = torch.nan
        got = torch.full_like(out[0], torch.nan), torch.full_like(lse[0], torch.nan)
        merging = merge_launch(out, lse, None, *got)
        run(merging.kernel, merging.grid, device=out.device, **merging.arguments)
        assert_near(got[0], expected.out, 1e-6, 1e-6, "out")
        assert_near(got[1], expected.lse, 1e-6, 1e-6, "lse")

    @pytest.mark.parametrize("apart", ["plain", "hidden", "first", "sinks", "terms", "all"])
    @pytest.mark.parametrize(("held", "dtype"), [(300, torch.float32), (37, HALF)])
    def test_a_decoder_step_over_a_cache(apart: str, held: int, dtype: torch.dtype):
        """As torch's products have it: hidden slots, other queries for the first keys, sinks, a cap and what terms add; v of its own width."""
        random = torch.Generator().manual_seed(held)
        shapes = ((3, 4, 16), (3, 320, 16), (3, 320, 24), (3, 4, 16), (3, 4, 1), (3, 4, held))
        q, keys, values, turned, sinks, added = (torch.randn(shape, generator=random) for shape in shapes)
        q, keys, values, turned = (x.to(dtype) for x in (q, keys, values, turned))
        keys[:, held:], values[:, held:] = torch.nan, torch.nan
        options: dict[str, Any] = {}
        if apart in ("hidden", "all"):
            options["hidden"] = torch.rand(3, 1, held, generator=random) < 0.3
            options["hidden"][1] = True
        if apart in ("first", "all"):
            options["first"] = (turned, 5)
        if apart in ("sinks", "all"):
            options["sink_logits"] = sinks
        if apart in ("terms", "all"):
            options |= {"softcap": 1.5, "added": added}
        assert TritonCache.serves(keys, values)
        got = TritonCache(keys, values).attend(q, held, 0.25, **options)
        absent = dict.fromkeys(("hidden", "first", "sink_logits", "added")) | {"softcap": 0.0}
        own = (q, keys[:, :held], values[:, :held], 0.25)
        wanted = products(*own, **{**absent, **options})
        atol, rtol = row("triton").capability.tolerance[dtype]
        assert_near(got.reshape(wanted.shape), wanted.double(), 2 * atol, 2 * rtol, apart)

    def test_transforms_and_graphs():
        """opcheck, fullgraph compile, vmap and a checkpoint, as for every row: the op hides the kernels."""
        q = torch.randn(1, 20, 2, 16, requires_grad=True)
        k, v = torch.randn(2, 1, 20, 2, 16).unbind()

        def loss(q: torch.Tensor) -> torch.Tensor:
            return attend(q, k, v, Full(causal=True), backend="triton").out.sum()

        eager = torch.autograd.grad(loss(q), q)[0]
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(q), q)[0], eager)
        again = torch.utils.checkpoint.checkpoint(loss, q, use_reentrant=False)
        assert isinstance(again, torch.Tensor)
        torch.testing.assert_close(torch.autograd.grad(again, q)[0], eager)
        mapped = torch.func.vmap(torch.func.grad(loss))(torch.stack([q.detach(), q.detach() * 2]))
        torch.testing.assert_close(mapped[0], eager)
        with torch.autocast("cpu", torch.bfloat16):
            assert attend(q, k, v, Full(), backend="triton", out_dtype=BRAIN).out.dtype == BRAIN

    def test_checked_and_exported():
        """opcheck over the ops with this row named, and an exported program gives eager's numbers."""
        q, k, v = (torch.randn(1, 20, 2, 16, requires_grad=True) for _ in range(3))
        seen = Recorder()
        with seen:
            attend(q, k, v, Full(causal=True), backend="triton").out.sum().backward()
        assert [str(func) for func, _ in seen.calls] == ["longattn.attend.default", "longattn.attend_backward.default"]
        for func, args in seen.calls:
            torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))

        class Module(torch.nn.Module):
            def forward(self, q: torch.Tensor) -> torch.Tensor:
                return attend(q, q, q, Full(causal=True), backend="triton").out

        program = torch.export.export(Module(), (q.detach(),))
        torch.testing.assert_close(program.module()(q.detach()), Module()(q.detach()))

    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, BRAIN])
    def test_delta_of_several_rectangles_is_made_once(dtype: torch.dtype, deterministic: bool):
        """A backward of one of them reads neither out nor the gradient of lse, and gives float32: parts over two halves of keys add up."""
        generator = torch.Generator().manual_seed(0)
        q, k, v, grad = (torch.randn(1, 96, 2, 16, generator=generator).to(dtype) for _ in range(4))
        environment = find_environment("")

        def arguments_of(first: int, many: int) -> OpArguments:
            places = [0, 96, 1], [first, many, 1], [2, 0, 2]
            options = (None, 0.0, True, False, "triton", deterministic, torch.float32, "")
            return OpArguments(LONGNET.canonical(), *places, *options)

        whole = arguments_of(0, 96)
        out, lse = attend_rectangle(OpTensors(q, k, v), whole, environment)
        cotangents = Cotangents(grad, torch.randn(lse.shape, generator=generator), out, lse)
        expected = rectangle_gradients(cotangents, OpTensors(q, k, v), whole, environment)
        delta = minus_delta_of(*cotangents[:3])
        unread = cotangents._replace(
            grad_lse=torch.full_like(lse, float("nan")), out=torch.full_like(out, float("nan"))
        )
        parts = []
        for first in (0, 48):
            half = OpTensors(q, k[:, first : first + 48], v[:, first : first + 48])
            parts.append(rectangle_gradients(unread, half, arguments_of(first, 48), environment, part=GradientPart(delta, None)))  # fmt: skip
        dq = parts[0][0] + parts[1][0]
        found = (dq, *(torch.cat([part[n] for part in parts], 1) for n in (1, 2)))
        assert {x.dtype for x in found} == {torch.float32}
        for a, b in zip(found, expected, strict=False):
            torch.testing.assert_close(a, b.float(), atol=2e-5 if dtype == torch.float32 else 3e-2, rtol=2e-2)

    @pytest.mark.parametrize(
        "pattern", [Full(causal=True), LONGNET, LONGNET.with_causal(True), Window(9, sinks=2)], ids=str
    )
    def test_a_call_waits_for_no_device(monkeypatch: pytest.MonkeyPatch, pattern: Pattern):
        """Once its tables are there, neither way reads a number back, asks for positions or copies between devices: a graph can hold it.

        Counted over everything but the kernels themselves, which the interpreter runs through numpy.
        """
        from longattn.kernels.triton import launch_backward, launch_forward

        launched: list[str] = []
        for module in (launch_forward, launch_backward):
            monkeypatch.setattr(module, "run", lambda kernel, *_, **__: launched.append(kernel.__name__))
        q, k, v = (torch.randn(1, 140, 2, 16, requires_grad=True) for _ in range(3))

        def step() -> None:
            attend(q, k, v, pattern, backend="triton").out.sum().backward()

        step()  # tables are made and copied once
        launched.clear()
        with Recorder() as seen:
            step()
        assert "forward_kernel" in launched and "keys_kernel" in launched
        waiting = (
            "_local_scalar_dense",
            "nonzero",
            "is_nonzero",
            "unique",
            "masked_select",
            "_to_copy.default",
            "equal",
        )
        assert not [name for name in seen.names if any(word in name for word in waiting)]

    def test_the_row_is_first_where_it_can_serve():
        """On CPU tensors only while interpreting."""
        assert explain(Full(), (1, 8, 2, 16), dtype=torch.float32).backend == "triton"
        assert (
            attend(*torch.randn(3, 1, 8, 1, 4), Full(), backend="triton", sink_logits=torch.zeros(1))
            .out.isfinite()
            .all()
        )

    from longattn.kernels.triton import launch_backward, launch_forward

    FORMS: list[Any] = [
        {"direction": "forward", "prior": True, "grouped": True},
        *(
            pytest.param(flags, marks=pytest.mark.nightly)
            for flags in (
                {"direction": "forward"}, {"direction": "forward", "value_width": 32, "softcap": True, "by_distance": True},
                {"direction": "dense forward", "dtype": HALF}, {"direction": "backward", "deterministic": True},
                {"direction": "forward", "listed": True, "attention_mask": True, "bias": True},
                {"direction": "backward", "grouped": True, "dropout": True, "key_padding": True},
            )
        ),
    ]  # fmt: skip

    def form_of(**flags: Any) -> self_check.Form:
        absent = dict.fromkeys(self_check.Form._fields[4:], False)
        return self_check.Form(**{"dtype": torch.float32, "width": 16, "value_width": 16, **absent, **flags})

    @pytest.mark.parametrize("flags", FORMS, ids=lambda flags: " ".join(map(str, flags)))
    def test_a_form_that_is_right_passes_its_own_check(flags: dict[str, Any]):
        assert self_check.wrong(form_of(**flags), torch.device("cpu")) == ""

    @pytest.mark.parametrize("stored", [torch.float16, torch.int8, torch.float8_e4m3fn], ids=str)
    def test_the_kernel_over_pages_passes_its_own_check(stored: torch.dtype):
        form = paged_check.PagedForm(torch.float16, stored, 32, 16)
        assert paged_check.wrong(form, torch.device("cpu"), attend_pages) == ""

        def off(*given: Any) -> None:
            attend_pages(*given)
            given[-2].mul_(1.1)

        assert "float16 over pages of" in paged_check.wrong(form, torch.device("cpu"), off)

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_a_form_that_is_wrong_is_caught_by_its_own_check(direction: str, monkeypatch: pytest.MonkeyPatch):
        """A product that is off by a thousandth, as a miscompiled one may be."""
        honest = launch_forward.forward if direction == "forward" else launch_backward.backward

        def off(*arguments: Any) -> Any:
            first, *rest = honest(*arguments)
            return first * 1.001, *rest

        monkeypatch.setattr(launch_forward if direction == "forward" else launch_backward, direction, off)
        said = self_check.wrong(form_of(direction=direction), torch.device("cpu"))
        assert re.fullmatch(
            rf"{direction} float32 D16: (out|dq) is [\d.e-]+ off the float64 oracle at 200 queries, 200 keys", said
        )
