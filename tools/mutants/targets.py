"""What is mutated, and the tests that are to notice: the narrowest that hold the target's promises."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Target:
    """Some source files of one package and the tests that stand over them.

    Attributes:
        package: whose source is copied and mutated.
        files: patterns of paths below `packages/PACKAGE/src/longattn/PACKAGE`.
        tests: test files of packages, as `PACKAGE/NAME` or `PACKAGE/NAME::TEST`, quick ones first.
        options: further options of pytest.
        environment: variables for the tests.
        native: whether the source is C++ and is compiled for each mutant.
    """

    package: str
    files: tuple[str, ...]
    tests: tuple[str, ...]
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict[str, str])
    native: bool = False


TARGETS: dict[str, Target] = {
    "algebra": Target(
        "patterncache",
        ("spans.py", "indices.py", "plan.py", "planning/*.py", "patterns/*.py"),
        tuple(
            f"patterncache/test_{name}"
            for name in (
                "plan_parts", "patterns", "named_patterns", "algebra", "block_sparse", "combined_strided", "block_layout", "limits", "scored", "lint",
                "exports", "foreign", "hostile_input", "wire",
            )
        ),
    ),
    "cache": Target(
        "patterncache",
        ("caching/*.py",),
        tuple(
            f"patterncache/test_{name}"
            for name in ("cache", "cache_policy", "cache_flight", "held_bytes", "hostile_input", "wire", "cache_global", "device_tier")
        ),
    ),
    "merge": Target(
        "kernels",
        ("state.py", "reference.py", "philox.py", "positions.py", "lowering/*.py", "eager/gather.py", "eager/grouping.py"),
        tuple(f"kernels/test_{name}" for name in ("states", "lowering", "sinks", "decode", "dropout", "attend", "rows", "bad_input", "dispatch")),
        environment={"LONGATTN_NATIVE_FLAGS": "-O1"},
    ),
    "memory": Target(
        "bufmgr",
        ("memory/allocator.py", "memory/arena.py", "memory/segment.py", "leasing/*.py", "pool.py", "spec.py"),
        tuple(
            f"bufmgr/test_bufmgr_{name}"
            for name in ("arena", "pool", "slots", "spec", "manager", "lifetimes", "policies", "visibility", "allocators", "devices", "release", "machine", "learning")
        ),
    ),
    "ring": Target(
        "attention",
        (
            "ring_buffer/advance.py", "ring_buffer/cursor.py", "ring_buffer/*_ring.py", "ring_buffer/rings.py", "ring_buffer/positions.py",
            "ring_buffer/parts.py", "schedules/layouts.py", "schedules/extents.py", "schedules/passes.py",
        ),
        tuple(
            f"attention/test_{name}"
            for name in (
                "ring_buffer_positions", "ring_buffer_rewind", "ring_buffer", "ring_buffer_machine", "ring_buffer_gradients", "ring_buffer_tiles",
                "ring", "ring_packing", "extents", "ring_gradients",
            )
        ),
    ),
    "native": Target(
        "kernels",
        ("native/*.h", "native/*.cpp"),
        (*(f"kernels/test_native_{name}" for name in ("short", "decode", "rows")), "kernels/test_score_terms"),
        # Narrower forms than the machine's own are the same source, and would be compiled for each mutant too.
        options=("-k", "not level and not avx2 and not avx512 and not generic"),
        native=True,
        environment={"LONGATTN_NATIVE_FLAGS": "-O1"},
    ),
}  # fmt: skip
