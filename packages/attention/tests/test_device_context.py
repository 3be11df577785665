"""Inside `torch.device("meta")`, as deferred initialisation has it, calls on tensors that are there compute what they compute outside."""

import pytest
import torch

from longattn.attention import (
    MultiheadPatternAttention,
    PatternAttention,
    Ring,
    pattern_attention,
    shard_sequence,
    sparse_attention_weights,
)
from longattn.patterncache import Dilated

PATTERN = Dilated((4, 8), (1, 2), causal=True)
X = torch.randn(2, 13, 4, 8, generator=torch.Generator().manual_seed(0))
STARTS = torch.tensor([0, 3])
EMBEDDED = X.flatten(2)[..., :16]
MULTIHEAD = MultiheadPatternAttention(16, 2, PATTERN, rotary_base=50.0)


def drawn():
    """What is dropped is drawn from the CPU's generator."""
    torch.manual_seed(3)
    return pattern_attention(X, X, X, PATTERN, dropout_p=0.5)


def weighed(sparse):
    """A module's weights."""
    module = PatternAttention(PATTERN, sparse_weights=sparse)
    return module(X, X, X, need_weights=True)[1]


CALLS = {
    "seed": lambda: pattern_attention(X, X, X, PATTERN, dropout_p=0.5, seed=5),
    "drawn seed": drawn,
    "masked in a tiled row": lambda: pattern_attention(
        X, X, X, PATTERN, attention_mask=X[:, :, 0, :1].unsqueeze(1) > 0, backend="tiled"
    ),
    "positions_start": lambda: pattern_attention(X, X, X, PATTERN, positions_start=STARTS),
    "positions_start and dropout": lambda: pattern_attention(
        X, X, X, PATTERN, positions_start=STARTS, dropout_p=0.5, seed=1
    ),
    "cu_seqlens": lambda: pattern_attention(X[:1], X[:1], X[:1], PATTERN, cu_seqlens=[0, 5, 13]),
    "ring": lambda: pattern_attention(X, X, X, PATTERN, schedule=Ring(size=3, layout="zigzag")),
    "rotary": lambda: MULTIHEAD(EMBEDDED),
    "rotary of documents": lambda: MULTIHEAD(EMBEDDED[:1], cu_seqlens=[0, 5, 13]),
    "rotary and positions_start": lambda: MULTIHEAD(EMBEDDED, positions_start=STARTS),
    "shard_sequence": lambda: shard_sequence(X, Ring(size=2))[1],
    "weights": lambda: weighed(False),
    "sparse weights of a module": lambda: weighed(True).to_dense(),
    "sparse weights": lambda: sparse_attention_weights(X, X, PATTERN).to_dense(),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_do_not_depend_on_the_device_context(name):
    """The same numbers, on the device of the inputs."""
    expected = CALLS[name]()
    with torch.device("meta"):
        found = CALLS[name]()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
