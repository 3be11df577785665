"""What an analysis says: `Lint` and its `Gap`s, and `Reach`. Figures and their text; nothing is computed here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gap:
    """Residues of one dilated branch that no head serves: tokens there are not seen through it.

    Attributes:
        segment, rate: of the branch.
        residues: of the position in its segment modulo the rate, below the segment's length.
    """

    segment: int
    rate: int
    residues: tuple[int, ...]


@dataclass(frozen=True)
class Shares:
    """Which part of the earlier tokens (of all others, where not causal) a token sees, in the mean over pairs. Heads mix between layers.

    What is seen directly is learnt readily; what is only heard of over several layers is rarely learnt (`docs/quality.md`).

    Attributes:
        depth: layers of the model that was asked about.
        direct: in one layer, by some head.
        two_hops, within_depth: heard of after two layers, and after `depth`.
        never: not heard of after any number of layers; None where that was not followed to the end.
    """

    depth: int
    direct: float
    two_hops: float
    within_depth: float
    never: float | None

    def __str__(self) -> str:
        never = "never: not known" if self.never is None else f"never {self.never:.1%}"
        return (
            f"earlier tokens: {self.direct:.1%} seen directly, {self.two_hops:.1%} in two hops, {self.within_depth:.1%} within "
            f"{self.depth} layers; {never}"
        )


@dataclass(frozen=True)
class Lint:
    """What a pattern does to `length` tokens in `num_heads` heads.

    Attributes:
        pattern: its class name.
        length, num_heads: what was asked about.
        islands: groups of tokens that no depth joins; 1 is healthy.
        layers: layers until every token has heard of all that it may (of all before it where causal); None: it never has.
        layers_known: False where the walk was too long to follow here and `layers` says nothing; `reach` goes further.
        gaps: residues of dilated branches that no head covers.
        blind: tokens that see nothing in any head.
        starved: tokens after the first that see no token but themselves, in any head.
        first_starved: the first few of them.
        fewest_keys, mean_keys, most_keys: keys per query and head; a key that counts twice is two.
        pairs: (head, query, key) triples, with multiplicity.
        flops_forward, flops_backward: 4 and 10 per pair and head dimension: two and five matrix products.
        bytes_moved: q, k, v and out once, and lse in float32: the least that a forward moves.
        plan_bytes: index data of the plan of the stretches that differ; 0 where everything is strided.
        shares: of earlier tokens that are seen, where `lint` was asked for a depth; else None.
    """

    pattern: str
    length: int
    num_heads: int
    islands: int
    layers: int | None
    layers_known: bool
    gaps: tuple[Gap, ...]
    blind: int
    starved: int
    first_starved: tuple[int, ...]
    fewest_keys: int
    mean_keys: float
    most_keys: int
    pairs: int
    flops_forward: int
    flops_backward: int
    bytes_moved: int
    plan_bytes: int
    shares: Shares | None = None

    @property
    def line(self) -> str:
        """The verdict in one line."""
        depth = "depth not followed" if not self.layers_known else f"all joined after {self.layers} layers"
        if self.layers_known and self.layers is None:
            depth = "no depth joins all tokens"
        verdicts = [f"{self.islands} island{'s' * (self.islands != 1)}", depth]
        verdicts += [f"{len(self.gaps)} branch{'es' * (len(self.gaps) != 1)} with residues that no head covers"] * bool(
            self.gaps
        )
        verdicts += [f"{self.starved} tokens see only themselves"] * bool(self.starved)
        verdicts += [f"{self.blind} tokens see nothing"] * bool(self.blind)
        verdicts += [f"{self.fewest_keys} to {self.most_keys} keys per query, mean {self.mean_keys:.1f}"]
        return f"lint: {self.pattern}, {self.length} tokens, {self.num_heads} heads: " + "; ".join(verdicts)

    def __str__(self) -> str:
        lines = [self.line]
        lines += [
            f"  segment {gap.segment}, rate {gap.rate}: no head covers residues {_few(gap.residues)}"
            for gap in self.gaps
        ]
        lines += [f"  only themselves: positions {_few(self.first_starved, self.starved)}"] * bool(self.starved)
        lines.append(
            f"  {self.pairs} pairs: {self.flops_forward:.3e} FLOPs forward, {self.flops_backward:.3e} backward"
        )
        lines += [f"  {self.shares}"] * (self.shares is not None)
        lines.append(f"  {self.bytes_moved} bytes moved at least, {self.plan_bytes} bytes of index data")
        return "\n".join(lines)


def _few(values: tuple[int, ...], of: int | None = None) -> str:
    many = len(values) if of is None else of
    return ", ".join(str(value) for value in values[:8]) + (f", ... ({many})" if many > 8 else "")


@dataclass(frozen=True)
class Reach:
    """What stacked layers of one pattern can hear of. Heads mix between layers, and a token always keeps what it has.

    Attributes:
        length: tokens.
        layers: how many layers.
        fewest, mean, most: tokens that a token has heard of after them, itself included.
        complete: whether every token has heard of all, or of all before it where the pattern is causal.
        needed: the least number of layers after which that is so; None: it never is.
        islands: groups of tokens that no number of layers joins.
    """

    length: int
    layers: int
    fewest: int
    mean: float
    most: int
    complete: bool
    needed: int | None
    islands: int

    def __str__(self) -> str:
        depth = "no depth is enough" if self.needed is None else f"{self.needed} are enough"
        return (
            f"reach: {self.length} tokens, {self.layers} layers: {self.fewest} to {self.most} tokens heard of, mean "
            f"{self.mean:.1f}; {self.islands} island{'s' * (self.islands != 1)}; {depth}"
        )
