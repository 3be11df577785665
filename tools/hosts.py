"""Ranks on two to four hosts that are network namespaces of this machine, under torchrun, over links with delay, loss, reordering and a cut.

    python -m tools.hosts [--hosts N] [--dry-run]

Each host is a namespace with one interface; a namespace of its own holds the other ends, between which `tools.hosts_switch` carries frames. No
address but these is reached, and everything ends within its time. Needs root and Debian's iproute2. Exits with 0 where every check passed, 77 with a
reason where namespaces are not allowed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
CANNOT = 77
SCENARIOS = {
    "plain": (),
    "delay": ("--delay", "0.005"),
    "loss": ("--delay", "0.001", "--loss", "0.02"),
    "reordering": ("--delay", "0.002", "--reorder", "0.2"),
    "cut": (),
}
"""What the links do; "cut": the last host's is cut while calls go on, for longer than the schedule's timeout, and comes back."""
SECONDS = 150
"""That a scenario may take."""


def ip(*words: str) -> None:
    """Run `ip`.

    Raises:
        subprocess.CalledProcessError: it failed; its stderr says why.
    """
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@contextmanager
def hosts(count: int) -> Iterator[tuple[str, list[str]]]:
    """(namespace of the switch, namespaces of hosts), which are gone afterwards: interface eth0 at 10.77.0.1 and up, port0 and up at the switch."""
    prefix = f"longattn{os.getpid()}"
    switch, names = f"{prefix}s", [f"{prefix}h{number}" for number in range(count)]
    try:
        for name in (switch, *names):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        for number, name in enumerate(names):
            port = f"port{number}"
            peer = ("peer", "name", "eth0", "netns", name, "address", f"02:00:00:00:00:{number:02x}")
            ip("link", "add", port, "netns", switch, "type", "veth", *peer)
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", switch, "link", "set", port, "up")
        yield switch, names
    finally:
        for name in (switch, *names):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


def refusal() -> str | None:
    """Why no hosts can be made here; None where they can."""
    if shutil.which("ip") is None:
        return "ip is not installed (iproute2)"
    try:
        with hosts(1):
            return None
    except subprocess.CalledProcessError as problem:
        return f"network namespaces are not allowed here: {problem.stderr.strip()}"


def inside(name: str, *words: str, **options: str) -> subprocess.Popen[str]:
    """Start Python in a namespace, in a process group of its own."""
    environment = (
        os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"} | options
    )
    command = ["ip", "netns", "exec", name, sys.executable, *words]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def end(processes: list[subprocess.Popen[str]]) -> None:
    """Kill what is left, with its children."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, 9)
        process.wait()


def run(scenario: str, count: int, folder: Path) -> str | None:
    """What went wrong in a scenario, or None."""
    cut = folder / "cut"
    with hosts(count) as (switch, names):
        started = [inside(switch, "-m", "tools.hosts_switch", str(count), str(cut), *SCENARIOS[scenario])]
        try:
            for number, name in enumerate(names):
                where = ("--nnodes", str(count), "--node-rank", str(number), "--nproc-per-node", "1")
                meet = ("--master-addr", "10.77.0.1", "--master-port", "29500")
                script = (str(ROOT / "tools" / "hosts_checks.py"), scenario, str(folder))
                started.append(inside(name, "-m", "torch.distributed.run", *where, *meet, *script))
            deadline = time.monotonic() + SECONDS
            while any(process.poll() is None for process in started[1:]):
                if time.monotonic() > deadline:
                    return f"{scenario}: not done after {SECONDS} s"
                # Ranks say where they are by files: all in calls, and all failed.
                if scenario == "cut":
                    calling = all((folder / f"calling{number}").exists() for number in range(count))
                    failed = all((folder / f"failed{number}").exists() for number in range(count))
                    cut.touch() if calling and not failed else cut.unlink(missing_ok=True)
                time.sleep(0.1)
            if started[0].poll() is not None:
                return f"{scenario}: the switch ended: {started[0].communicate()[0][-1000:]}"
            failures = [process for process in started[1:] if process.returncode]
            return "\n".join(f"{scenario}: {process.communicate()[0][-3000:]}" for process in failures) or None
        finally:
            end(started)


def main() -> int:
    """Every scenario, on as many hosts as were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hosts", type=int, default=2, choices=(2, 3, 4))
    parser.add_argument("--only", choices=SCENARIOS)
    parser.add_argument("--dry-run", action="store_true", help="only say whether hosts can be made here")
    given = parser.parse_args()
    reason = refusal()
    if reason is not None:
        print(reason)
        return CANNOT
    wrong = 0
    for scenario in [] if given.dry_run else [given.only] if given.only else SCENARIOS:
        with tempfile.TemporaryDirectory() as folder:
            began, problem = time.monotonic(), run(scenario, given.hosts, Path(folder))
        print(problem or f"{scenario}, {given.hosts} hosts: right, {time.monotonic() - began:.0f} s", flush=True)
        wrong += problem is not None
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
