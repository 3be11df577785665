"""Adaptors that stack: traces that replay, bounded retries, poison, and the text for Prometheus."""

import copy
import pickle
import random
import re
from pathlib import Path

import pytest
import torch

from longattn.bufmgr import (
    AllocationTrace,
    ArenaAllocator,
    AttentionBufferManager,
    BufferType,
    FailureCallbackAllocator,
    LimitingAllocator,
    MemoryPool,
    PoisoningAllocator,
    RecordingAllocator,
    Statistics,
    StatisticsAllocator,
    SystemAllocator,
    TraceEvent,
    prometheus_text,
)
from longattn.bufmgr.testing import FailingAllocator

TEMP = BufferType.TEMP


def random_calls(allocator: RecordingAllocator, steps: int = 400, seed: int = 0) -> None:
    """Take and give back blocks of mixed sizes; some requests are refused, and some blocks stay out."""
    rng, held = random.Random(seed), []
    for _ in range(steps):
        if held and rng.random() < 0.45:
            allocator.deallocate(held.pop(rng.randrange(len(held))))
            continue
        try:
            held.append(allocator.allocate(rng.choice([1, 64, 4096, 70_000, 300_000])))
        except MemoryError:
            continue


@pytest.mark.parametrize("seed", range(3))
def test_replay_gives_the_same_statistics(seed: int, tmp_path: Path):
    """Through a file, at another allocator: all six figures, refusals left out."""
    counted = StatisticsAllocator(LimitingAllocator(SystemAllocator(), 2_000_000))
    recording = RecordingAllocator(counted)
    random_calls(recording, seed=seed)
    trace = recording.trace()
    assert {event.action for event in trace.events} == {"allocate", "deallocate", "refuse"}
    trace.save(tmp_path / "trace.csv")
    loaded = AllocationTrace.load(tmp_path / "trace.csv")
    assert [event[1:] for event in loaded.events] == [event[1:] for event in trace.events]
    failing = FailingAllocator(ArenaAllocator())
    assert loaded.replay(failing) == counted.statistics
    assert counted.statistics.current_count > 0
    assert failing.blocks == {}  # what the trace left out came back after the count


def test_a_managers_trace_replays():
    """A step of training, recorded below the manager."""
    recording = RecordingAllocator(SystemAllocator())
    counted = StatisticsAllocator(recording)
    manager = AttentionBufferManager(upstream=counted)
    for step in range(12):
        x = manager.allocate("query", (64, step % 3 + 1, 32)).normal_()
        scores = manager.allocate("scores", (100, 1000 + step))
        manager.deallocate(scores, "scores")
        del x
    manager.clear_cache()
    assert recording.trace().replay(SystemAllocator()) == counted.statistics
    assert counted.statistics.current_bytes == 0 < counted.statistics.total_count


def test_a_trace_that_cannot_be():
    with pytest.raises(ValueError, match="out, got block 7"):
        AllocationTrace([TraceEvent(0.0, "deallocate", 7, 1)]).replay(SystemAllocator())
    twice = AllocationTrace([TraceEvent(0.0, "allocate", 0, 10)] * 2)
    failing = FailingAllocator()
    with pytest.raises(ValueError, match="block 0 once at a time"):
        twice.replay(failing)
    assert failing.blocks == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "header seconds,action,block,nbytes, got \\[\\]"),
        ("seconds,action,block,nbytes\n0.0,allocate,0,8\n0.1,steal,0,8\n", "lines\\[3\\] must be seconds"),
        ("seconds,action,block,nbytes\n0.0,allocate,zero,8\n", "lines\\[2\\]"),
        ("seconds,action,block,nbytes\n0.0,allocate,0\n", "lines\\[2\\]"),
    ],
)
def test_a_file_that_is_no_trace(text: str, message: str, tmp_path: Path):
    (tmp_path / "trace.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        AllocationTrace.load(tmp_path / "trace.csv")


def test_a_recording_is_bounded_and_says_so():
    recording = RecordingAllocator(SystemAllocator(), max_events=3)
    for _ in range(5):
        recording.deallocate(recording.allocate(8))
    assert (len(recording.trace().events), recording.lost_events) == (3, 7)
    twin = pickle.loads(pickle.dumps(recording))
    assert (twin.max_events, twin.trace().events, twin.lost_events) == (3, (), 0)
    assert copy.copy(recording).max_events == 3


def test_retries_are_bounded():
    """A callback that always says yes does not loop for ever; one that frees enough is called no more than needed."""
    failing = FailingAllocator()
    calls: list[int] = []

    def ask_again(nbytes: int) -> bool:
        calls.append(nbytes)
        return True

    allocator = FailureCallbackAllocator(failing, ask_again, max_retries=3)
    failing.refusals_left = 100
    with pytest.raises(MemoryError, match="on purpose") as caught:
        allocator.allocate(9)
    assert calls == [9, 9, 9]
    assert "after 3 retries" in caught.value.__notes__[0]
    failing.refusals_left = 2
    assert allocator.allocate(9).nbytes == 9
    assert len(calls) == 5


def test_poison_shows_what_is_read_too_early_or_too_late():
    below = ArenaAllocator()
    allocator = PoisoningAllocator(below)
    block = allocator.allocate(65536)
    values = torch.frombuffer(block.memory, dtype=torch.float32)
    assert not block.zeroed and values.isnan().all()
    values.fill_(1.0)
    allocator.deallocate(block)
    assert values.isnan().all()
    manager = AttentionBufferManager(upstream=allocator)
    assert manager.allocate(TEMP, (100,)).isnan().all()
    assert not manager.allocate(TEMP, (200,), zero_init=True).any()


# The text format: comment lines, or NAME{LABELS} VALUE; names and labels as the format's grammar has them.
_SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*",?)*)\} (-?\d+)')
_COMMENT = re.compile(r"# (HELP [a-zA-Z_:][\w:]* .+|TYPE [a-zA-Z_:][\w:]* (counter|gauge))")


def parse(text: str) -> dict[tuple[str, str], int]:
    samples: dict[tuple[str, str], int] = {}
    assert text.endswith("\n")
    family = ""
    for line in text.splitlines():
        if line.startswith("#"):
            assert _COMMENT.fullmatch(line), line
            family = line.split()[2]
            continue
        match = _SAMPLE.fullmatch(line)
        assert match is not None, line
        name, labels, value = match.groups()
        assert name == family and (name, labels) not in samples
        samples[name, labels] = int(value)
    return samples


def test_prometheus_text_holds_the_counters():
    pool = MemoryPool()
    counted = StatisticsAllocator(pool)
    manager = AttentionBufferManager(upstream=counted)
    held = manager.allocate("scores", (1000,), torch.float32)
    manager.deallocate(manager.allocate("query", (10,)), "query")
    manager.allocate("query", (10,))
    samples = parse(prometheus_text({"train": manager, "pool": pool, 'odd "name"\\\n': counted}))
    prefix = "longattn_bufmgr_"
    assert samples[f"{prefix}cache_hits_total", 'source="train",type="query"'] == 1
    assert samples[f"{prefix}cache_misses_total", 'source="train",type="query"'] == 1
    assert samples[f"{prefix}outstanding_buffers", 'source="train",type="scores"'] == 1
    nbytes = manager.memory_stats()["reserved_bytes.all.current"]
    assert nbytes > held.nbytes
    for name in ("train", "pool", r"odd \"name\"\\\n"):
        assert samples[f"{prefix}reserved_bytes", f'source="{name}"'] == nbytes, name
        assert samples[f"{prefix}taken_blocks_total", f'source="{name}"'] == 2
    assert prometheus_text({}) == ""
    with pytest.raises(TypeError, match="sources\\['x'\\] must be a manager"):
        prometheus_text({"x": Statistics()})  # pyright: ignore[reportArgumentType]
