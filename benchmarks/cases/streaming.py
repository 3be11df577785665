"""Streams that hold what later queries see, beside caches that hold everything, a window, or whole numbers; bytes held are figures of their own.

H=8, D=64, bfloat16, segments 2048/4096/8192 at rates 1/2/4. `seq_len` counts the tokens before the step; a call makes a step and takes it back,
at the position where a period of the pattern holds most. `streams` is one step of 64 streams of different lengths under full causal attention,
in slots of one batch, beside the same streams padded into one batch of torch's attention. `storage` is a step over 8 bits beside bfloat16.
`python -m benchmarks.cases.streaming` appends bytes held to `results/streaming-figures.csv`.
"""

import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import record
from benchmarks.calls import Calls
from benchmarks.cases.decode import HEAD_DIM, HEADS, ring_and_memory, tokens
from benchmarks.experiment import Labels, Targets
from benchmarks.figures import Figure, append
from benchmarks.peers.growing_caches import Step, installed
from longattn.attention import StreamingAttention, StreamingState, pattern_attention
from longattn.attention.streaming.slot_buffer import Storage
from longattn.patterncache import Dilated, Full, Pattern

SEGMENTS, RATES = (2048, 4096, 8192), (1, 2, 4)
WINDOW, STREAMS = 2048, 64
LENGTHS, BATCHES = (8192, 32768, 131072), (1, 8)
BEFORE_END = 2
"""Tokens that lack to a period's end, where most keys are held."""
DTYPE = torch.bfloat16
SMALLER = 0.55


def dilated(divide: int = 1) -> Pattern:
    """The pattern, its segments divided by `divide`."""
    return Dilated([s // divide for s in SEGMENTS], RATES, causal=True)


def history(length: int, batch: int, dtype: torch.dtype = DTYPE) -> tuple[Tensor, Tensor]:
    """k, v of so many tokens, the same 8192 again and again."""
    _, k, v = tokens(min(length, 8192), batch, dtype)
    often = -(-length // 8192)
    return k.repeat(1, often, 1, 1)[:, :length], v.repeat(1, often, 1, 1)[:, :length]


def attention(pattern: Pattern, storage: Storage | None = None) -> StreamingAttention:
    """A module whose streams take one token back."""
    return StreamingAttention(pattern, num_heads=HEADS, head_dim=HEAD_DIM, max_rewind=1, storage=storage)


def stream(module: StreamingAttention, k: Tensor, v: Tensor) -> StreamingState:
    """A state that has read these keys and values, of which no output was wanted."""
    state = module.new_state(k.shape[0], dtype=k.dtype)
    for start in range(0, k.shape[1], 1024):
        keys, values = k[:, start : start + 1024], v[:, start : start + 1024]
        last = module._expiry.last_queries(start, keys.shape[1])
        state.tables[0].evict(start + keys.shape[1])
        state.write(None, keys, values, [last])
        state.tables[0].evict(state.tables[0].position)
        state.trim(None)
    return state


def step(module: StreamingAttention, state: StreamingState) -> Callable[[], object]:
    """A token for each row, taken back."""
    token = tokens(1, state.batch_size, state.dtype, seed=1)

    def call() -> None:
        with torch.inference_mode():
            module(*token, state)
        state.rewind(1)

    return call


def ours(pattern: Pattern, length: int, batch: int, storage: Storage | None = None) -> Callable[[], object]:
    """A step after so many tokens."""
    module = attention(pattern, storage)
    return step(module, stream(module, *history(length, batch)))


def peer_step(make: Callable[[], Step], batch: int) -> Callable[[], object]:
    """A step of a peer. A cache that grows keeps it: a few tokens among thousands."""
    call, token = make(), tokens(1, batch, DTYPE, seed=1)

    def run() -> None:
        with torch.inference_mode():
            call(*token)

    return run


def peers(length: int, batch: int) -> dict[str, Callable[[], Step]]:
    """Our ring of all tokens, a window's, and transformers' cache where it is installed."""
    named: dict[str, Callable[[], Step]] = {
        "full ring": lambda: ring_and_memory(length, batch, DTYPE)[0],
        f"window {WINDOW}": lambda: ring_and_memory(WINDOW, batch, DTYPE)[0],
    }
    if (make := installed().get("DynamicCache")) is not None:
        named["DynamicCache"] = lambda: make(*history(length, batch))
    return named


def lengths(longest: int) -> list[int]:
    """Of the streams, spread evenly up to the longest."""
    return [longest * (i + 1) // STREAMS for i in range(STREAMS)]


def streams(longest: int) -> tuple[StreamingAttention, StreamingState]:
    """All streams, each in a row of one batch."""
    module = attention(Full(causal=True))
    pool = module.new_pool(dtype=DTYPE)
    state = module.new_state(STREAMS, pool=pool)
    k, v = history(longest, 1)
    for row, n in enumerate(lengths(longest)):
        alone = module.new_state(1, pool=pool)
        alone.write(None, k[:, :n], v[:, :n], [module._expiry.last_queries(0, n)])
        state.admit(row, alone)
    return module, state


def padded_batch(longest: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A step of the same streams, padded on the right into one tensor: the token is written behind each, and padding is masked."""
    k, v = (x.expand(STREAMS, -1, -1, -1).transpose(1, 2) for x in history(longest, 1))
    keys, values = (torch.cat((x, x[:, :, :1]), 2) for x in (k, v))
    at = torch.tensor(lengths(longest))
    seen = (torch.arange(longest + 1) <= at[:, None])[:, None, None]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = torch.arange(STREAMS)
        keys[rows, :, at], values[rows, :, at] = k[:, 0], v[:, 0]
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=seen).transpose(1, 2)

    return call


def wrong() -> list[str]:
    """The gate: four tokens after 60 of a small pattern are the last rows of the whole forward."""
    q, k, v = tokens(64, 2, torch.float32)
    module = attention(dilated(128))
    state = stream(module, k[:, :60], v[:, :60])
    expected = pattern_attention(q, k, v, module.pattern)[:, 60:]
    parts = [module(q[:, at : at + 1], k[:, at : at + 1], v[:, at : at + 1], state)[0] for at in range(60, 64)]
    error = float((torch.cat(parts, 1) - expected).abs().max())
    return [] if error <= 2e-5 else [f"ours: off by {error:.1e}"]


def wrong_streams() -> list[str]:
    """The gate: a step of all streams is the padded batch's, in bfloat16."""
    module, state = streams(STREAMS * 2)
    token = tokens(1, STREAMS, DTYPE, seed=1)
    error = float((module(*token, state)[0] - padded_batch(STREAMS * 2)(*token)).abs().max())
    return [] if error <= 3e-2 else [f"ours: off by {error:.1e}"]


def wrong_storage(storage: Storage) -> list[str]:
    """The gate: 8 bits are near bfloat16's numbers, and not the same."""
    token, outs = tokens(1, 1, DTYPE, seed=1), []
    for kind in (None, storage):
        module = attention(Full(causal=True), kind)
        outs.append(module(*token, stream(module, *history(64, 1)))[0])
    error = float((outs[0] - outs[1]).abs().max())
    return [] if 0 < error <= 0.1 else [f"ours: {storage} is off by {error:.1e}"]


def _labels(variant: str, peer: str, length: int) -> Labels:
    return Labels("streaming", variant, peer, "bfloat16", length, True, "forward")


def experiments(quick: bool) -> Iterator[Calls]:
    """Every length and batch beside each peer; 64 streams; both storages of 8 bits."""
    for length in (64,) if quick else LENGTHS:
        for batch in BATCHES:
            for peer, make in peers(length, batch).items():
                yield Calls(
                    name=f"step-b{batch}",
                    labels=_labels(f"1 step b{batch}", peer, length),
                    targets=Targets(),
                    ours=lambda length=length, batch=batch: ours(dilated(), length - BEFORE_END, batch),
                    peer=lambda make=make, batch=batch: peer_step(make, batch),
                    gate=wrong,
                )
    longest = 128 if quick else 4096
    yield Calls(
        name="streams",
        labels=_labels(
            f"1 step of {STREAMS} streams of {longest // STREAMS} to {longest} tokens", "padded batch", longest
        ),
        targets=Targets(),
        ours=lambda: step(*streams(longest)),
        peer=lambda: peer_step(lambda: padded_batch(longest), STREAMS),
        gate=wrong_streams,
    )
    kinds: tuple[Storage, ...] = ("int8", "fp8")
    for storage in kinds:
        for name, pattern, length, batch in (("full", Full(causal=True), 32768, 1), ("dilated", dilated(), 8192, 8)):
            size = 64 if quick else length
            yield Calls(
                name=f"storage-{name}-{storage}",
                labels=_labels(f"{name}, {storage}, 1 step b{batch}", "bfloat16", size),
                targets=Targets() if quick else Targets(ratio=1.0),
                ours=lambda p=pattern, n=size, b=batch, s=storage: ours(p, n - BEFORE_END, b, s),
                peer=lambda p=pattern, n=size, b=batch: ours(p, n - BEFORE_END, b),
                gate=lambda s=storage: wrong_storage(s),
            )


def held() -> Iterator[Figure]:
    """Bytes of keys and values that a cache holds in bfloat16 after so many tokens, a row of the batch: those of ours are counted."""
    token = 2 * HEADS * HEAD_DIM * DTYPE.itemsize
    for length in LENGTHS:
        setting = f"dilated 2048/4096/8192 at 1/2/4, H={HEADS}, D={HEAD_DIM}, {length} tokens"
        beside = f"full cache {length * token}; window of {WINDOW} {min(length, WINDOW) * token}"
        full = None
        for storage in (None, "int8", "fp8"):
            nbytes = stream(attention(dilated(), storage), *history(length - BEFORE_END, 1)).nbytes
            full = full or nbytes
            most = None if storage is None else SMALLER * full
            yield Figure("bytes held, a row", f"{setting}, {storage or 'bfloat16'}", "bytes", nbytes, beside, most=most)


if __name__ == "__main__":
    append("streaming-figures", held(), record.surroundings())
    sys.exit()
