"""`longattn plan`: memory and time of a decoder-only model, from counts; what is assumed is said."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import asdict, dataclass

import torch

from longattn.attention.cli.patterns import pattern_of
from longattn.attention.cli.report import Report, Table
from longattn.attention.schedules.balance import pairs_of
from longattn.attention.schedules.simulation import Hardware, Prediction, simulate
from longattn.attention.schedules.traffic import ScheduledCall
from longattn.kernels.interface import MACHINES, Machine
from longattn.patterncache import Pattern
from longattn.patterncache.spans import shortened

GIB = 1024**3
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
ADAM_STATE = {"float64": 16, "float32": 8, "bfloat16": 12, "float16": 12}
"""Bytes a parameter: two moments; in half precision of float32, with the weights in float32 beside."""

_MOST_LINTED = 1 << 20
"""Tokens up to which a plan lints its pattern: that takes time and memory for each of them, and the plan itself does not."""

ASSUMPTIONS = (
    "assumed: every device reaches the given share of its peak in products, and its memory's bandwidth; links do not disturb one another, and what a ring sends travels "
    "while it computes; activations are those of a pre-norm layer with a two-matrix feed-forward; softmax, norms and the allocator's own overhead cost nothing. A plan, "
    "not a measurement."
)


@dataclass(frozen=True)
class Budget:
    """What one device holds, in bytes, and what one pass takes.

    Attributes:
        parameters: of the model. weights, gradients, optimizer: bytes of them.
        activations: bytes kept for the backward, or alive at once in a forward.
        cache: keys and values of all layers, for decoding after a forward; 0 in training. in_flight: shards of a ring on their way.
        product_flops, attention_flops: of one pass, a device's share.
        product_seconds, attention_seconds: of one pass, which takes both. transfer_seconds: of what travels, most of it while attention computes.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    cache: int
    in_flight: int
    product_flops: float
    attention_flops: float
    product_seconds: float
    attention_seconds: float
    transfer_seconds: float

    @property
    def total(self) -> int:
        """Bytes on one device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.cache + self.in_flight

    @property
    def seconds(self) -> float:
        """Expected seconds of one pass."""
        return self.product_seconds + self.attention_seconds


def run(options: Namespace) -> Report:
    """The budget of one device, as a table."""
    if options.machine not in MACHINES:
        raise ValueError(f"--machine must be one of {', '.join(MACHINES)}, got {shortened(options.machine)}")
    if options.ring > options.length:
        raise ValueError(f"--ring must be at most --length={options.length}, got {options.ring}")
    kv_heads = options.kv_heads or options.heads
    if options.heads % kv_heads:
        raise ValueError(f"--kv-heads must divide --heads={options.heads}, got {kv_heads}")
    pattern, machine = pattern_of(options), MACHINES[options.machine]
    # Two products of a forward, five of a backward, and the forward's two again where it is recomputed.
    products = 2 if not options.train else 9 if options.recompute else 7
    passes = 2 * products * options.head_dim * pairs_of(pattern, 0, options.length, options.length, options.heads)
    call = ScheduledCall(
        pattern, options.length, options.ring, options.heads, kv_heads, options.head_dim, options.batch, getattr(torch, options.dtype)
    )  # fmt: skip
    hardware = Hardware(_speed(options, machine), machine.levels[-1].bandwidth or math.inf, options.link * 1e9)
    layer = simulate(call, options.engine, hardware, backward=options.train)
    again = simulate(call, options.engine, hardware, backward=False) if options.train and options.recompute else None
    found = budget(options, kv_heads, options.batch * options.layers * passes, machine, layer, again)
    tokens = options.batch * options.length
    rows = [
        ("weights", _gib(found.weights), f"{found.parameters / 1e9:.3f} billion parameters in {options.dtype}"),
        ("gradients", _gib(found.gradients), "as the weights" if options.train else "none"),
        (
            "optimizer",
            _gib(found.optimizer),
            f"Adam, {ADAM_STATE[options.dtype]} bytes a parameter" if options.train else "none",
        ),
        (
            "activations",
            _gib(found.activations),
            "each layer's input, and one layer's"
            if options.recompute
            else "of all layers"
            if options.train
            else "of one layer",
        ),
        ("key-value cache", _gib(found.cache), "none" if options.train else "of all layers"),
        (
            "shards in flight",
            _gib(found.in_flight),
            "none" if options.ring == 1 else f"of {options.engine}, {options.ring} devices",
        ),
        ("together", _gib(found.total), "on one device"),
    ]
    what = "step of training" if options.train else "forward of the whole sequence"
    ring = (
        f" on the slowest of {layer.readers} ranks looked at); {options.engine} receives {options.layers * layer.received / GIB:.3g} GiB on a device "
        f"({found.transfer_seconds:.3g} s if nothing overlapped)"
    )
    sentence = (
        f"a {what}: {found.seconds:.3g} s, {tokens / found.seconds:.4g} tokens a second on {options.ring} x {options.machine}: "
        f"{found.product_flops:.3g} FLOP in projections on a device at {options.efficiency:g} of its peak ({found.product_seconds:.3g} s), "
        f"{found.attention_flops:.3g} in attention ({found.attention_seconds:.3g} s{ring if options.ring > 1 else ')'}"
    )
    parts: list[Table | str] = [
        pattern.canonical(),
        Table("", ("what", "GiB", "of"), rows),
        sentence,
        _verdict(pattern, options),
        ASSUMPTIONS,
    ]
    data = {
        "pattern": pattern.canonical(),
        **asdict(found),
        "total": found.total,
        "seconds": found.seconds,
        "assumptions": ASSUMPTIONS,
    }
    return Report(data, parts)


def budget(
    options: Namespace, kv_heads: int, attention_flops: float, machine: Machine, layer: Prediction, again: Prediction | None
) -> Budget:  # fmt: skip
    """What one device of `options.ring` holds and does.

    Args:
        options: of `longattn plan`.
        kv_heads: key and value heads.
        attention_flops: of all layers and sequences, forward, and where trained backward.
        machine: whose peak is taken.
        layer: the attention of one layer. again: its forward, where a backward makes it once more.

    Raises:
        ValueError: the machine's peak for the dtype is not known.
    """
    width, size = options.heads * options.head_dim, BYTES[options.dtype]
    kv_width, hidden = kv_heads * options.head_dim, int(options.mlp_ratio * options.heads * options.head_dim)
    in_layers = options.layers * (2 * width * width + 2 * width * kv_width + 2 * width * hidden)
    parameters = in_layers + options.vocabulary * width
    tokens = -(-options.batch * options.length // options.ring)
    # Two norms' inputs, q, k, v, the attention's out and lse, the residual, the feed-forward before and after its activation.
    of_layer = tokens * (size * (4 * width + width + 2 * kv_width + 2 * hidden) + 4 * options.heads)
    passes = 1 if not options.train else 4 if options.recompute else 3
    if not options.train:
        activations = of_layer
    elif options.recompute:
        activations = options.layers * tokens * width * size + of_layer
    else:
        activations = options.layers * of_layer
    shard = 2 * tokens * kv_width * size
    products = passes * 2 * tokens * (in_layers + options.vocabulary * width)
    return Budget(
        parameters=parameters,
        weights=parameters * size,
        gradients=parameters * size if options.train else 0,
        optimizer=parameters * ADAM_STATE[options.dtype] if options.train else 0,
        activations=activations,
        cache=0 if options.train else options.layers * shard,
        in_flight=layer.in_flight,
        product_flops=products,
        attention_flops=attention_flops / options.ring,
        product_seconds=products / _speed(options, machine),
        attention_seconds=options.layers * (layer.seconds + (again.seconds if again else 0.0)),
        transfer_seconds=options.layers * (layer.transfer + (again.transfer if again else 0.0)),
    )


def _verdict(pattern: Pattern, options: Namespace) -> str:
    """What the pattern does to the sequence, in a line."""
    if options.length > _MOST_LINTED:
        return f"lint: not made beyond {_MOST_LINTED} tokens, each of which it looks at"
    return pattern.lint(options.length, options.heads).line


def _speed(options: Namespace, machine: Machine) -> float:
    """FLOP a second that the device is assumed to reach."""
    bits = 32 if options.dtype == "float32" else 16
    if options.dtype == "float64" or bits not in machine.peak:
        raise ValueError(
            f"--dtype must be one whose peak is known on {machine.name}: {_known(machine)}, got {shortened(options.dtype)}"
        )
    return options.efficiency * machine.peak[bits]


def _known(machine: Machine) -> str:
    names = {16: "bfloat16, float16", 32: "float32"}
    return ", ".join(names[bits] for bits in sorted(machine.peak) if bits in names) or "none"


def _gib(amount: int) -> str:
    return f"{amount / GIB:.3f}"
