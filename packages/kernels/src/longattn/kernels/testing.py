"""For tests of backends, ours and yours: Hypothesis strategies, `check_backend`, `check_merge_laws`, and poisoned memory.

Needs the extra `longattn-kernels[testing]`. Nothing that ships imports this module.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st

from longattn.kernels.cases import BIASES as BIASES
from longattn.kernels.cases import LAYOUTS as LAYOUTS
from longattn.kernels.cases import MASKS as MASKS
from longattn.kernels.cases import TERMS as TERMS
from longattn.kernels.cases import Case as Case
from longattn.kernels.cases import Tensors as Tensors
from longattn.kernels.cases import lay_out as lay_out
from longattn.kernels.cases import random_mask as random_mask
from longattn.kernels.cases import random_terms as random_terms
from longattn.kernels.conformance import assert_near as assert_near
from longattn.kernels.conformance import check_backend as check_backend
from longattn.kernels.conformance import expect_case as expect_case
from longattn.kernels.conformance import run_case as run_case
from longattn.kernels.conformance import tolerance as tolerance
from longattn.kernels.poison import poisoned_memory as poisoned_memory
from longattn.kernels.state import AttentionState, merge
from longattn.patterncache import Pattern
from longattn.patterncache.testing import patterns, spans


@st.composite
def cases(
    draw: st.DrawFn, dtype: torch.dtype = torch.float32, pattern: st.SearchStrategy[Pattern] | None = None
) -> Case:
    """Any call: any pattern and rectangle, ragged and empty lengths, GQA, head shards, masks, padding, priors and strides."""
    chosen = draw(patterns() if pattern is None else pattern)
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * group
    first = draw(st.integers(0, 3))
    case = Case(
        chosen,
        batch=draw(st.integers(0, 3)),
        kv_heads=kv_heads,
        group=group,
        head_dim=draw(st.sampled_from([1, 3, 4, 8, 16])),
        value_head_dim=draw(st.sampled_from([None, None, 2, 20])),
        shard=draw(st.sampled_from([None, (first, first + heads + draw(st.integers(0, 3)))])),
        is_causal=draw(st.sampled_from([None, None, True, False])),
        softmax_scale=draw(st.sampled_from([None, None, 0.0, -0.5, 1.5])),
        mask=draw(st.sampled_from([*MASKS, *BIASES])),
        terms=draw(st.sampled_from([(), *TERMS])),
        padding=draw(st.booleans()),
        prior=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.3])),
        layouts=draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 5)),
        dtype=dtype,
        seed=draw(st.integers(0, 1000)),
    )
    if draw(st.booleans()):
        nq, nk = sorted((draw(st.integers(0, 40)), draw(st.integers(0, 40))))
        return replace(case, lengths=(nq, nk))
    q_spans, k_spans = (tuple(draw(st.lists(spans(), min_size=1, max_size=2))) for _ in range(2))
    nq, nk = (sum(s.length for s in side) for side in (q_spans, k_spans))
    return replace(case, lengths=(nq, nk), q_spans=q_spans, k_spans=k_spans)


def check_merge_laws(a: AttentionState, b: AttentionState, c: AttentionState, *, atol: float = 1e-5) -> None:
    """Assert that `merge` commutes, associates, and has the empty state as identity, on any three states of one shape."""
    for left, right in (
        (merge(a, b), merge(b, a)),
        (merge(merge(a, b), c), merge(a, merge(b, c))),
        (merge(a, AttentionState.empty(a.out)), a),
        (merge(AttentionState.empty(a.out), a), a),
    ):
        assert_near(left.out, right.out, atol, atol, "out")
        assert_near(left.lse, right.lse, atol, atol, "lse")
