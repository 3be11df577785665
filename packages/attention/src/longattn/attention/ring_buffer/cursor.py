"""`Cursor`: how far the stream of a row of the batch is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass
class Cursor:
    """Counters of one row of the batch, or of all rows where they agree.

    Attributes:
        position: tokens written so far; the position of the next one.
        restorable: evicted tokens before this position cannot come back.
        fed: outputs written to the feedback ring so far.
        fed_restorable: outputs before this one were overwritten.
        decoded: [first position, count] of each stretch of decoded tokens that the feedback ring may still hold, oldest first.
    """

    position: int = 0
    restorable: int = 0
    fed: int = 0
    fed_restorable: int = 0
    decoded: list[list[int]] = field(default_factory=list[list[int]])

    def clone(self) -> Cursor:
        """A copy that shares nothing."""
        return replace(self, decoded=[list(stretch) for stretch in self.decoded])

    def decode(self, count: int, capacity: int) -> None:
        """Outputs were written for the last `count` tokens."""
        self.fed += count
        first = self.position - count
        if self.decoded and self.decoded[-1][0] + self.decoded[-1][1] == first:
            self.decoded[-1][1] += count
            return
        self.decoded.append([first, count])
        if len(self.decoded) > capacity:
            # Each stretch has a token at least: the oldest one is overwritten.
            del self.decoded[0]

    def rewind(self, tokens: int, capacity: int, max_rewind: int) -> None:
        """Step back by `tokens`, where the ring holds `capacity` tokens and keeps `max_rewind` evicted ones."""
        self.restorable = max(self.restorable, self.position - capacity - max_rewind)
        self.fed_restorable = max(self.fed_restorable, self.fed - capacity)
        self.position -= tokens
        while self.decoded and self.decoded[-1][0] + self.decoded[-1][1] > self.position:
            first, count = self.decoded[-1]
            remaining = max(0, self.position - first)
            self.fed -= count - remaining
            self.decoded[-1][1] = remaining
            if not remaining:
                self.decoded.pop()
        # Tokens from here on are written anew: of those that were lost only the ones before stay so.
        self.restorable = min(self.restorable, self.position)
