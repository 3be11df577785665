"""Bad input at the edge: every message names the parameter, what was expected and what came."""

from typing import Any

import numpy as np
import pytest
import torch

from longattn.kernels import AttentionState, attend, explain, reference_attention
from longattn.patterncache import Dilated, Full, Span

Q, K = torch.zeros(2, 6, 4, 8), torch.zeros(2, 9, 2, 8)
STATE = AttentionState(torch.zeros(2, 6, 4, 8), torch.zeros(2, 6, 4))
TRUE = torch.ones(2, 9, dtype=torch.bool)


def swap(**changes: Any) -> dict[str, Any]:
    return {"q": Q, "k": K, "v": K, "pattern": Full(), **changes}


BAD = [
    # q, k, v: type and dtype
    (swap(q=np.zeros((2, 6, 4, 8))), TypeError, r"q must be a torch\.Tensor.*got ndarray"),
    (swap(k=[[1.0]]), TypeError, r"k must be a torch\.Tensor.*got list"),
    (swap(v=None), TypeError, r"v must be a torch\.Tensor.*got NoneType"),
    (swap(q=Q.int()), TypeError, r"q must have one of the dtypes float16.*got int32"),
    (swap(v=K.bool()), TypeError, r"v must have one of the dtypes.*got bool"),
    (swap(k=K.to(torch.complex64)), TypeError, r"k must have one of the dtypes.*got complex64"),
    (swap(q=Q.to(torch.float8_e4m3fn)), TypeError, r"q must have one of the dtypes.*got float8_e4m3fn"),
    (swap(k=K.half()), TypeError, r"k must have the dtype of q, float32, got float16"),
    (swap(v=K.double()), TypeError, r"v must have the dtype of q, float32, got float64"),
    # q, k, v: shape and device
    (swap(q=Q[0]), ValueError, r"q must have shape \(batch, seq, heads, head_dim\), got \(6, 4, 8\)"),
    (swap(v=K[None]), ValueError, r"v must have shape \(batch, seq, heads, head_dim\), got \(1, 2, 9, 2, 8\)"),
    (swap(k=K[:1]), ValueError, r"k must have the batch size of q, 2, got 1"),
    (swap(k=K[..., :7]), ValueError, r"k must have the head_dim of q, 8, got 7"),
    (swap(v=K[..., :0]), ValueError, r"v must have head_dim >= 1, got shape"),
    (swap(v=K[:, :8]), ValueError, r"v must have the length and heads of k, \(9, 2\), got \(8, 2\)"),
    (swap(v=K[:, :, :1]), ValueError, r"v must have the length and heads of k, \(9, 2\), got \(9, 1\)"),
    (swap(q=Q[:, :, :3]), ValueError, r"k must have a number of heads that divides that of q, 3, got 2"),
    (swap(k=K[:, :, :0], v=K[:, :, :0]), ValueError, r"k must have a number of heads that divides that of q, 4, got 0"),
    (swap(q=Q[:, :, :0]), ValueError, r"q must have at least one head.*got shape \(2, 6, 0, 8\)"),
    (swap(q=Q[..., :0], k=K[..., :0], v=K[..., :0]), ValueError, r"q must have at least one head and head_dim >= 1"),
    (swap(k=K.to("meta")), ValueError, r"k must be on the device of q, cpu, got meta"),
    (swap(v=K.to("meta")), ValueError, r"v must be on the device of q, cpu, got meta"),
    # pattern and its causal field
    (swap(pattern="full"), TypeError, r"pattern must be a Pattern.*got 'full' \(str\)"),
    (swap(pattern=Full), TypeError, r"pattern must be a Pattern.*ABCMeta"),
    (swap(pattern=None), TypeError, r"pattern must be a Pattern.*NoneType"),
    (swap(pattern=Dilated((4,) * 5, (1,) * 5, "split")), ValueError, r"at most one branch per head, got 5 branches"),
    (swap(is_causal=1), TypeError, r"is_causal must be None, True or False, got 1 \(int\)"),
    # attention_mask
    (
        swap(attention_mask=np.ones((6, 9), bool)),
        TypeError,
        r"attention_mask must be a bool or floating torch\.Tensor, got ndarray",
    ),
    (swap(attention_mask=torch.ones(6, 9).int()), TypeError, r"attention_mask must be bool.*got int32"),
    (swap(attention_mask=torch.ones(9, 6).bool()), ValueError, r"attention_mask.*\(2, 4, 6, 9\), got \(9, 6\)"),
    (swap(attention_mask=torch.ones(2, 2, 6, 9).bool()), ValueError, r"attention_mask.*got \(2, 2, 6, 9\)"),
    (swap(attention_mask=torch.ones(1, 1, 1, 6, 9).bool()), ValueError, r"attention_mask.*got \(1, 1, 1, 6, 9\)"),
    (swap(attention_mask=torch.ones(6, 9).bool().to("meta")), ValueError, r"attention_mask must be on the device of q"),
    # key_padding_mask
    (swap(key_padding_mask=[True]), TypeError, r"key_padding_mask must be a bool torch\.Tensor.*got list"),
    (swap(key_padding_mask=TRUE.float()), TypeError, r"key_padding_mask must be bool, True = padding, got float32"),
    (swap(key_padding_mask=TRUE[:, :6]), ValueError, r"key_padding_mask.*\(batch, Nk\) = \(2, 9\), got \(2, 6\)"),
    (swap(key_padding_mask=TRUE[0]), ValueError, r"key_padding_mask.*got \(9,\)"),
    (swap(key_padding_mask=TRUE.to("meta")), ValueError, r"key_padding_mask must be on the device of q, cpu, got meta"),
    # scale, flags, backend, out_dtype
    (swap(softmax_scale="1"), TypeError, r"softmax_scale must be None or a number, got '1' \(str\)"),
    (swap(softmax_scale=True), TypeError, r"softmax_scale must be None or a number, got True \(bool\)"),
    (
        swap(softmax_scale=torch.tensor(1)),
        TypeError,
        r"softmax_scale must be None, a number or a floating tensor, got int64",
    ),
    (swap(softmax_scale=float("nan")), ValueError, r"softmax_scale must be None or a finite number, got nan"),
    (swap(softmax_scale=float("inf")), ValueError, r"softmax_scale must be None or a finite number, got inf"),
    (swap(deterministic="yes"), TypeError, r"deterministic must be None, True or False, got 'yes' \(str\)"),
    (swap(backend="fast"), ValueError, r"backend must be None or one of .*'native'.*got 'fast'"),
    (swap(backend=3), TypeError, r"backend must be None or one of .*got 3 \(int\)"),
    (swap(out_dtype="float32"), TypeError, r"out_dtype must be None or one of the torch dtypes.*got 'float32'"),
    (swap(out_dtype=torch.int64), TypeError, r"out_dtype must be None or one of the torch dtypes.*got torch\.int64"),
    # prior
    (swap(prior=(STATE.out, STATE.lse)), TypeError, r"prior must be None or an AttentionState, got tuple"),
    (swap(prior=AttentionState(STATE.out[:1], STATE.lse)), ValueError, r"prior.*\(2, 6, 4, 8\).*got.*\(1, 6, 4, 8\)"),
    (swap(prior=AttentionState(STATE.out, STATE.lse[:, :5])), ValueError, r"prior.*\(2, 6, 4\).*got.*\(2, 5, 4\)"),
    (
        swap(prior=AttentionState(STATE.out.bfloat16(), STATE.lse)),
        TypeError,
        r"prior\.out must be float32.*got bfloat16",
    ),
    (swap(prior=AttentionState(STATE.out, STATE.lse.double())), TypeError, r"prior\.lse must be float32.*got float64"),
    (swap(prior=AttentionState(STATE.out.to("meta"), STATE.lse)), ValueError, r"prior\.out must be on the device of q"),
    # spans and heads
    (swap(q_spans=Span(0, 5)), ValueError, r"q_spans must cover 6 positions.*got 5"),
    (swap(k_spans=(Span(0, 5), Span(9, 5))), ValueError, r"k_spans must cover 9 positions.*got 10"),
    (swap(q_spans=()), ValueError, r"q_spans must cover 6 positions.*got 0"),
    (swap(q_spans=(0, 6)), TypeError, r"q_spans must be None, a Span or a tuple of Spans, got \(0, 6\)"),
    (swap(k_spans="all"), TypeError, r"k_spans must be None, a Span or a tuple of Spans, got 'all'"),
    (swap(heads=Span(0, 3)), ValueError, r"heads must be None or a Span of 4 neighbouring heads.*got Span"),
    (swap(heads=Span(0, 4, 2)), ValueError, r"heads must be None or a Span of 4 neighbouring heads.*step=2"),
    (swap(heads=(0, 4)), TypeError, r"heads must be None or a Span of 4 neighbouring heads.*got \(0, 4\) \(tuple\)"),
    (swap(heads=4), TypeError, r"heads must be None or a Span of 4 neighbouring heads.*got 4 \(int\)"),
    (swap(heads=Span(2, 4), num_heads=5), ValueError, r"num_heads must be an integer >= 6.*got 5"),
    (swap(num_heads=3), ValueError, r"num_heads must be an integer >= 4.*got 3"),
    (swap(num_heads=4.0), TypeError, r"num_heads must be an integer >= 4.*got 4\.0 \(float\)"),
    (swap(num_heads="8"), TypeError, r"num_heads must be an integer >= 4.*got '8' \(str\)"),
    (swap(num_heads=True), TypeError, r"num_heads must be an integer >= 4.*got True \(bool\)"),
    # dropout and seed
    (swap(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1\.0"),
    (swap(dropout_p=-0.1), ValueError, r"dropout_p must be in \[0, 1\), got -0\.1"),
    (swap(dropout_p=float("nan")), ValueError, r"dropout_p must be in \[0, 1\), got nan"),
    (swap(dropout_p="0.1"), TypeError, r"dropout_p must be a number in \[0, 1\), got '0\.1' \(str\)"),
    (swap(dropout_p=True), TypeError, r"dropout_p must be a number in \[0, 1\), got True \(bool\)"),
    (
        swap(dropout_p=0.1, seed=1.5),
        TypeError,
        r"seed must be None, an integer or a 0-dim int64 tensor, got 1\.5 \(float\)",
    ),
    (swap(dropout_p=0.1, seed=True), TypeError, r"seed must be None, an integer .*got True \(bool\)"),
    (swap(dropout_p=0.1, seed=torch.tensor([1])), ValueError, r"seed must be a 0-dim int64 tensor.*got shape \(1,\)"),
    (swap(dropout_p=0.1, seed=torch.tensor(1.0)), ValueError, r"seed must be a 0-dim int64 tensor.*float32"),
    (swap(dropout_p=0.1, seed=2**64), ValueError, r"seed must fit 64 bits.*got 18446744073709551616"),
    (swap(seed="now"), TypeError, r"seed must be None, an integer .*got 'now' \(str\)"),
    (swap(environment="global"), TypeError, r"environment must be None or an Environment, got 'global' \(str\)"),
    (swap(colour="red"), TypeError, r"unexpected keyword argument 'colour'"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), BAD, ids=[words for _, _, words in BAD])
def test_attend_names_what_is_wrong(arguments: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        attend(**arguments)


BAD_EXPLAIN = [
    ({"pattern": "full"}, TypeError, r"pattern must be a Pattern"),
    (
        {"q_shape": (1, 8, 8)},
        ValueError,
        r"q_shape must be \(batch, seq, heads, head_dim\), integers >= 0, got \(1, 8, 8\)",
    ),
    ({"q_shape": Q}, ValueError, r"q_shape must be"),
    ({"k_shape": (1, -8, 2, 4)}, ValueError, r"k_shape must be .*got \(1, -8, 2, 4\)"),
    ({"k_shape": (1, 8, 2, 4.0)}, ValueError, r"k_shape must be .*got \(1, 8, 2, 4\.0\)"),
    ({"q_shape": (1, 8, 0, 4)}, ValueError, r"q_shape must have at least one head"),
    ({"k_shape": (1, 8, 3, 4)}, ValueError, r"k_shape must have .* heads that divides"),
    ({"k_shape": (1, 8, 2, 5)}, ValueError, r"k_shape must have the batch and head_dim of q_shape"),
    ({"dtype": "float32"}, TypeError, r"dtype must be None or one of the torch dtypes.*got 'float32'"),
    ({"dtype": torch.int32}, TypeError, r"dtype must be None or one of the torch dtypes.*got torch\.int32"),
    ({"device": "banana"}, ValueError, r"device must name a device that torch knows.*got 'banana'"),
    ({"device": 3.5}, TypeError, r"device must be None, a torch\.device or a string.*got 3\.5 \(float\)"),
    ({"is_causal": "no"}, TypeError, r"is_causal must be None, True or False, got 'no' \(str\)"),
    ({"attention_mask": TRUE}, TypeError, r"attention_mask must be None, True or False"),
    ({"backend": "fast"}, ValueError, r"backend must be None or one of"),
    ({"pattern": Full(causal=True), "k_shape": (1, 5, 2, 4)}, ValueError, r"q_start.*must be given.*Nq=8, Nk=5"),
    ({"is_causal": True, "k_shape": (1, 5, 2, 4)}, ValueError, r"q_start.*must be given.*Nq=8, Nk=5"),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD_EXPLAIN, ids=[words for _, _, words in BAD_EXPLAIN])
def test_explain_names_what_is_wrong(changes: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        explain(**{"pattern": Full(), "q_shape": (1, 8, 2, 4), **changes})


COUNTS = np.ones((4, 6, 9), np.int64)
BAD_REFERENCE = [
    ({"q": Q[0]}, ValueError, r"q must have shape"),
    ({"k": K[:, :, :1].repeat(1, 1, 3, 1)}, ValueError, r"v must have the length and heads of k"),
    ({"counts": COUNTS[:, :5]}, ValueError, r"counts must be broadcastable to \(2, 4, 6, 9\), got \(4, 5, 9\)"),
    ({"counts": COUNTS.tolist()}, TypeError, r"counts must be a plain tensor"),
    ({"softmax_scale": torch.ones(2)}, ValueError, r"softmax_scale must be broadcastable to \(4,\), got \(2,\)"),
    ({"softmax_scale": float("nan")}, ValueError, r"softmax_scale must be None or a finite number, got nan"),
    ({"softmax_scale": 10**400}, ValueError, r"softmax_scale must be None or a finite number"),
    ({"bias": torch.zeros(1, 2, 4, 6, 9)}, ValueError, r"bias must be broadcastable to \(2, 4, 6, 9\)"),
    ({"bias": torch.zeros(6, 9).to_sparse()}, TypeError, r"bias must be a plain tensor"),
    (
        {"keep": torch.zeros(2, 1, 6, 8)},
        ValueError,
        r"keep must be broadcastable to \(2, 4, 6, 9\), got \(2, 1, 6, 8\)",
    ),
    ({"keep": torch.zeros(6, 9, device="meta")}, TypeError, r"keep must be a plain tensor"),
    ({"distance": torch.zeros(2, 6, 9)}, ValueError, r"distance must be broadcastable to \(6, 9\)"),
    ({"key_padding_mask": TRUE[:, :8]}, ValueError, r"key_padding_mask must have shape \(batch, Nk\) = \(2, 9\)"),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD_REFERENCE, ids=[words for _, _, words in BAD_REFERENCE])
def test_the_oracle_names_what_is_wrong(changes: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        reference_attention(**{"q": Q, "k": K, "v": K, "counts": COUNTS, **changes})


def test_the_oracle_takes_whatever_can_be_broadcast():
    """Counts, bias and keep of fewer axes, and of ones; a scale for each head or for all; distances of a row."""
    q, k = torch.rand(2, 6, 4, 8), torch.rand(2, 9, 2, 8)
    plain = reference_attention(q, k, k, COUNTS)
    for counts in (COUNTS[:1], COUNTS[:1, :1], torch.ones(2, 1, 6, 9)):
        torch.testing.assert_close(reference_attention(q, k, k, counts).out, plain.out)
    for same in (
        {"bias": torch.zeros(9)}, {"bias": torch.zeros(2, 1, 6, 1)}, {"keep": torch.ones(())}, {"keep": torch.ones(4, 1, 9)},
        {"softmax_scale": 8**-0.5}, {"softmax_scale": torch.full((4,), 8**-0.5, dtype=torch.float64)},
        {"softmax_scale": torch.tensor(8**-0.5, dtype=torch.float64)}, {"distance": torch.zeros(1, 9, dtype=torch.int64)},
    ):  # fmt: skip
        torch.testing.assert_close(reference_attention(q, k, k, COUNTS, **same).out, plain.out)
