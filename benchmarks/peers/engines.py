"""Other engines' dense attention on CPUs, forward only: OpenVINO's and onnxruntime's, of whichever the wheels are installed.

`openvino` is one wheel; onnxruntime's takes two, `onnxruntime` and `onnx`, and has no bfloat16. Neither is a dependency: where they are
missing there are no rows.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

_Shape = tuple[int, ...]


def openvino_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Softmax attention by OpenVINO's `scaled_dot_product_attention`, in float32 or bfloat16.

    Args:
        q, k, v: (batch, seq, heads, head_dim), all of one shape.
        causal: whether query i sees only keys up to i.

    Returns:
        (batch, seq, heads, head_dim), the dtype of q.
    """
    request, make = _openvino_model(tuple(q.shape), q.dtype, causal, torch.get_num_threads())
    kept = [x.contiguous() for x in (q, k, v)]
    for number, x in enumerate(kept):
        request.set_input_tensor(number, make(x))
    request.infer()
    out: Any = request.get_output_tensor(0).data
    if q.dtype == torch.bfloat16:
        return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16).clone()
    return torch.from_numpy(out).clone()


@lru_cache(maxsize=4)
def _openvino_model(
    shape: _Shape, dtype: torch.dtype, causal: bool, threads: int
) -> tuple[Any, Callable[[Tensor], Any]]:
    """A request of the compiled model, and what makes a tensor an input without a copy."""
    ov, ops = import_module("openvino"), import_module("openvino.opset13")
    half = dtype == torch.bfloat16
    kind, heads_first = ov.Type.bf16 if half else ov.Type.f32, np.array([0, 2, 1, 3])
    given = [ops.parameter(list(shape), kind) for _ in range(3)]
    out = ops.scaled_dot_product_attention(*(ops.transpose(x, heads_first) for x in given), causal=causal)
    model = ov.Model([ops.transpose(out, heads_first)], given)
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "bf16" if half else "f32"}
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()

    def tensor(x: Tensor) -> Any:
        if half:
            return ov.Tensor(x.detach().view(torch.int16).numpy().view(np.uint16), list(shape), kind)
        return ov.Tensor(x.detach().numpy(), shared_memory=True)

    return request, tensor


def onnxruntime_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Softmax attention by onnxruntime's `MultiHeadAttention`, in float32.

    Args:
        q, k, v: (batch, seq, heads, head_dim), float32, all of one shape.
        causal: whether query i sees only keys up to i.

    Returns:
        (batch, seq, heads, head_dim), float32.
    """
    batch, seq, heads, dim = q.shape
    session = _onnx_session(tuple(q.shape), causal, torch.get_num_threads())
    given = {
        name: x.detach().reshape(batch, seq, heads * dim).numpy() for name, x in zip("qkv", (q, k, v), strict=True)
    }
    return torch.from_numpy(session.run(None, given)[0]).view(q.shape)


@lru_cache(maxsize=4)
def _onnx_session(shape: _Shape, causal: bool, threads: int) -> Any:
    onnx, runtime = import_module("onnx"), import_module("onnxruntime")
    batch, seq, heads, dim = shape
    helper, sizes, domain = onnx.helper, [batch, seq, heads * dim], "com.microsoft"
    node = helper.make_node(
        "MultiHeadAttention", list("qkv"), ["out"], domain=domain, num_heads=heads, unidirectional=int(causal)
    )
    inputs, out = (
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes) for name in names]
        for names in ("qkv", ["out"])
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    model = helper.make_model(helper.make_graph([node], "attention", inputs, out), opset_imports=opsets, ir_version=10)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


ENGINES: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[..., Tensor]]] = {
    "openvino": (("openvino",), ("float32", "bfloat16"), openvino_attention),
    "onnxruntime": (("onnxruntime", "onnx"), ("float32",), onnxruntime_attention),
}
"""{name: (modules, dtypes, attention)}."""


def installed(dtype: str) -> dict[str, Callable[..., Tensor]]:
    """Those that are installed and take such numbers."""
    return {
        name: attention
        for name, (modules, dtypes, attention) in ENGINES.items()
        if dtype in dtypes and all(find_spec(module) is not None for module in modules)
    }
