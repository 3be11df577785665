"""A switch with bad links: `python -m tools.hosts_switch PORTS CUT [--delay S] [--loss P] [--reorder P]`, carries frames between port0, port1, ...

The interface at port N has the address 02:00:00:00:00:N. As long as a file CUT is there, the last port's link is cut. In user space, because not
every kernel has the queueing discipline netem.
"""

from __future__ import annotations

import argparse
import heapq
import random
import select
import socket
import time
from itertools import count
from pathlib import Path

_ALL = 0x0003
_SOL_PACKET, _VNET_HEADER, _OUTGOING = 263, 15, 4
_HEADER = 10
"""Bytes of `struct virtio_net_hdr`, which goes with each frame: checksums and segments that the sender left to the hardware."""


def opened(port: str) -> socket.socket:
    """A socket that has every frame of an interface."""
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
    raw.setsockopt(_SOL_PACKET, _VNET_HEADER, 1)
    raw.bind((port, _ALL))
    return raw


def targets(frame: bytes, source: int, ports: int) -> list[int]:
    """The ports that a frame leaves by."""
    to = frame[_HEADER : _HEADER + 6]
    if to[0] & 1:
        return [port for port in range(ports) if port != source]
    return [to[5]] if to[:5] == b"\x02\0\0\0\0" and to[5] < ports and to[5] != source else []


def carry(ports: int, cut: Path, delay: float, loss: float, reorder: float) -> None:
    """Without end. A frame is lost with a probability of `loss`; with one of `reorder` it waits for three times the delay."""
    sockets = [opened(f"port{number}") for number in range(ports)]
    waiting: list[tuple[float, int, int, bytes]] = []
    numbers, chance = count(), random.Random(0)
    while True:
        patience = max(0.0, min(0.05, waiting[0][0] - time.monotonic())) if waiting else 0.05
        ready, _, _ = select.select(sockets, [], [], patience)
        is_cut = cut.exists()
        for raw in ready:
            source = sockets.index(raw)
            frame, (_, _, kind, *_) = raw.recvfrom(1 << 17)
            if kind == _OUTGOING or chance.random() < loss:
                continue
            due = time.monotonic() + delay * (3 if chance.random() < reorder else 1)
            for port in targets(frame, source, ports):
                if not (is_cut and ports - 1 in (source, port)):
                    heapq.heappush(waiting, (due, next(numbers), port, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, port, frame = heapq.heappop(waiting)
            sockets[port].send(frame)


def main() -> None:
    """Carry what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ports", type=int)
    parser.add_argument("cut", type=Path)
    for name in ("delay", "loss", "reorder"):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    carry(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
