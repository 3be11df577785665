"""Patterns are constants of a compiled graph: another pattern, or another number in one, compiles anew and is right."""

import pytest
import torch

from longattn.kernels import attend
from longattn.patterncache import BlockLayout, Dilated, Documents, Full, Periodic, Span, Strided, Window


def compiled_and_eager(function, *values):
    """Largest differences between a compiled function and itself, value by value, in one compiled object."""
    torch._dynamo.reset()
    q = torch.randn(1, 32, 2, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    return [float((compiled(q, value) - function(q, value)).abs().max()) for value in values]


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda n: Window(n), (3, 4, 9)),
        (lambda n: Dilated((n, 2 * n), (1, 2)), (4, 8, 6)),
        (lambda n: Strided(n), (2, 3, 5)),
        (lambda n: Window(2) | Full(causal=True) & Window(n), (3, 4, 5)),
        (lambda n: Documents([0, n, 32], Full()), (3, 4, 5)),
        (lambda n: BlockLayout("dilated_sparse", block_size=4, ratio=n), (0.2, 0.3, 0.5)),
    ],
)
def test_a_changed_number_recompiles(make, values):
    """An argument of the compiled function is a number of the pattern."""
    assert [0.0] * len(values) == compiled_and_eager(lambda q, n: attend(q, q, q, make(n)).out, *values)


def test_a_changed_pattern_recompiles():
    """Patterns themselves are arguments, several of one class and of others, and what has no bound."""
    patterns = (
        Window(3),
        Window(4),
        Dilated((8,), (2,)),
        Dilated((16,), (4,)),
        BlockLayout(block_size=4, ratio=0.2),
        BlockLayout(block_size=4, ratio=0.3),
        Periodic(2, [(0, 1, 0, None)], 64),
        Window(9) | Full(causal=True),
    )
    assert [0.0] * len(patterns) == compiled_and_eager(lambda q, p: attend(q, q, q, p).out, *patterns)


def test_a_changed_span_recompiles():
    """Spans of a ring's shard are numbers of the graph too."""

    def shard(q, start):
        return attend(q, q, q, Window(5), q_spans=(Span(start, 32),), k_spans=(Span(start, 32),)).out

    assert [0.0] * 3 == compiled_and_eager(shard, 0, 32, 64)
