"""States and their merge, without modules: `./run python examples/kernels_alone.py`.

Keys arrive in pieces, as from disk or from another machine. Each piece gives a state; states are merged in any order; the result is attention over all keys.
"""

import argparse
import itertools
import random

import torch

from longattn.kernels import attend, explain, fused_attention, merge, prepare, reference_attention
from longattn.patterncache import Dilated, Full, Span


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=300)
    parser.add_argument("--pieces", type=int, default=5)
    given = parser.parse_args(argv)

    n, heads, width = given.length, 4, 32
    pattern = Dilated((64, 256), (1, 4), causal=True)
    q, k, v = torch.randn(3, 1, n, heads, width)
    print(explain(pattern, (1, n, heads, width)))

    borders = [n * piece // given.pieces for piece in range(given.pieces + 1)]
    states = [
        attend(q, k[:, a:b], v[:, a:b], pattern, q_spans=Span(0, n), k_spans=Span(a, b - a))
        for a, b in itertools.pairwise(borders)
    ]
    random.shuffle(states)
    state = states[0]
    for other in states[1:]:
        state = merge(state, other)

    exact = reference_attention(q, k, v, torch.from_numpy(pattern.to_dense(n, heads)))
    error = (state.out.double() - exact.out.double()).abs().max().item()
    print(f"{given.pieces} pieces, merged in random order: largest error {error:.1e} beside float64")
    assert error < 2e-5
    torch.testing.assert_close(state.lse.double(), exact.lse.double(), atol=2e-5, rtol=2e-5)

    step = prepare(pattern, q, k, v)  # for a loop of equal shapes: checked once
    torch.testing.assert_close(step(q, k, v).out, exact.out.float(), atol=2e-5, rtol=2e-5)

    # Heads first, as Triton's tutorial has it, and dense.
    first = [x.transpose(1, 2) for x in (q, k, v)]
    dense = fused_attention(*first, causal=True).transpose(1, 2)
    torch.testing.assert_close(dense, attend(q, k, v, Full(causal=True)).out)
    print("prepared call and fused_attention agree")


if __name__ == "__main__":
    main()
