"""A step of a dilated stream, which holds what later queries see, beside a full cache, a sliding window and transformers' cache.

H=8, D=64, segments 2048/4096/8192 at rates 1/2/4. `seq_len` counts the tokens before the step; a call makes four steps and takes them back, at
the position where a period of the pattern holds most. Bytes held are in `bytes_held()`: `python -m benchmarks.cases.streaming` prints them.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.calls import Calls
from benchmarks.cases.decode import HEAD_DIM, HEADS, ring_and_memory, tokens
from benchmarks.experiment import Labels, Targets
from benchmarks.peers.growing_caches import Step, installed
from longattn.attention import StreamingAttention, StreamingState, pattern_attention
from longattn.patterncache import Dilated

STEPS = 4
SEGMENTS, RATES = (2048, 4096, 8192), (1, 2, 4)
WINDOW = 2048
LENGTHS, BATCHES = (8192, 32768, 131072), (1, 8)


def stream(k: Tensor, v: Tensor, divide: int = 1) -> tuple[StreamingAttention, StreamingState]:
    """A module, and a state that has read these keys and values, of which no output was wanted. Segments are divided by `divide`."""
    pattern = Dilated([s // divide for s in SEGMENTS], RATES, causal=True)
    module = StreamingAttention(pattern, num_heads=HEADS, head_dim=HEAD_DIM, max_rewind=STEPS)
    state = module.new_state(k.shape[0], dtype=k.dtype)
    for start in range(0, k.shape[1], 1024):
        keys, values = k[:, start : start + 1024], v[:, start : start + 1024]
        last = module._expiry.last_queries(start, keys.shape[1])
        state.tables[0].evict(start + keys.shape[1])
        state.write(None, keys, values, [last])
        state.tables[0].evict(state.tables[0].position)
        state.trim(None)
    return module, state


def steps(length: int, batch: int, dtype: torch.dtype) -> Callable[[], object]:
    """Four steps of ours, taken back."""
    module, state = stream(*tokens(length, batch, dtype)[1:])
    q, k, v = tokens(1, batch, dtype, seed=1)

    def call() -> None:
        with torch.inference_mode():
            for _ in range(STEPS):
                module(q, k, v, state)
        state.rewind(STEPS)

    return call


def peer_steps(make: Callable[[], Step], batch: int, dtype: torch.dtype) -> Callable[[], object]:
    """Four steps of a peer. A cache that grows keeps them: a few tokens among thousands."""
    step, token = make(), tokens(1, batch, dtype, seed=1)

    def call() -> None:
        with torch.inference_mode():
            for _ in range(STEPS):
                step(*token)

    return call


def peers(length: int, batch: int, dtype: torch.dtype) -> dict[str, Callable[[], Step]]:
    """A window's ring, and the full caches that this environment has."""

    def full(make: Callable[[Tensor, Tensor], Step]) -> Step:
        _, k, v = tokens(length, batch, dtype)
        return make(k, v)

    caches = {name: (lambda make=make: full(make)) for name, make in installed().items()}
    return {"window-2048": lambda: ring_and_memory(WINDOW, batch, dtype)[0], **caches}


def wrong() -> list[str]:
    """The gate: four steps after 60 tokens of a small pattern are the last rows of the whole forward."""
    q, k, v = tokens(64, 2, torch.float32)
    module, state = stream(k[:, :60], v[:, :60], divide=128)
    expected = pattern_attention(q, k, v, module.pattern)[:, 60:]
    parts = [module(q[:, at : at + 1], k[:, at : at + 1], v[:, at : at + 1], state)[0] for at in range(60, 64)]
    error = float((torch.cat(parts, 1) - expected).abs().max())
    return [] if error <= 2e-5 else [f"ours: off by {error:.1e}"]


def experiments(quick: bool) -> Iterator[Calls]:
    """Every length and batch, in bfloat16, beside each peer."""
    dtype = torch.bfloat16
    for length in (64,) if quick else LENGTHS:
        for batch in BATCHES:
            for peer, make in peers(length, batch, dtype).items():
                yield Calls(
                    name=f"step-b{batch}",
                    labels=Labels("streaming", f"{STEPS} steps b{batch}", peer, "bfloat16", length, True, "forward"),
                    targets=Targets(),
                    ours=lambda length=length, batch=batch: steps(length - 2 * STEPS, batch, dtype),
                    peer=lambda make=make, batch=batch: peer_steps(make, batch, dtype),
                    gate=wrong,
                )


def bytes_held(length: int, batch: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Bytes of keys and values that a cache holds after `length` tokens."""
    token = batch * 2 * HEADS * HEAD_DIM * dtype.itemsize
    _, state = stream(*tokens(length, batch, dtype)[1:])
    return {"ours": state.nbytes, "full cache": length * token, f"window of {WINDOW}": min(length, WINDOW) * token}


if __name__ == "__main__":
    for length in LENGTHS:
        for batch in BATCHES:
            held = ", ".join(f"{name} {nbytes}" for name, nbytes in bytes_held(length - 2 * STEPS, batch).items())
            print(f"{length} tokens, batch {batch}: {held}")
