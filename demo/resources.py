"""Whether the machine has the memory for the job, asked before anything is started (Linux; elsewhere not asked)."""

from pathlib import Path

from demo.options import Options
from demo.refusal import RefusalError

# Three Python processes with torch loaded, and the parent without it.
_PROCESSES = 1200 << 20
# Over q+k+v: inputs and dO three times (4), peaks of the gather-and-scatter baseline (5) and ours (2), and a margin.
_MULTIPLE = 13
# The picture and the oracle's float64 copies of k, v and their gradients, per element of q.
_ORACLE_BYTES = 8 * 6


def needed_bytes(options: Options) -> int:
    """Estimate of the peak of all processes together, in bytes of main memory."""
    elements = options.input_bytes // 3 // _item_bytes(options)
    return _PROCESSES + _MULTIPLE * options.input_bytes + _ORACLE_BYTES * elements


def _item_bytes(options: Options) -> int:
    assert options.seq_len is not None, "sizes are asked after the text is known"
    return options.input_bytes // (3 * options.seq_len * options.heads * options.head_dim)


def available_bytes() -> int | None:
    """What the kernel would still give this process: the least of MemAvailable and every cgroup limit above it.

    None where neither can be read.
    """
    amounts = [_meminfo(), *(_cgroup_room(folder) for folder in _cgroup_folders())]
    known = [amount for amount in amounts if amount is not None]
    return min(known) if known else None


def check_memory(options: Options) -> None:
    """Refuse if the estimate exceeds what is available.

    Raises:
        RefusalError: one line with both figures and a length that would fit.
    """
    available = available_bytes()
    needed = needed_bytes(options)
    if available is None or needed <= available or options.device != "cpu":
        return
    assert options.seq_len is not None, "sizes are asked after the text is known"
    per_token = (needed - _PROCESSES) / options.seq_len
    fits = int((available - _PROCESSES) / per_token)
    advice = f"pass --seq-len {fits} or less" if fits >= 1 else "free some memory"
    raise RefusalError(
        f"--seq-len {options.seq_len} needs about {needed / 2**30:.1f} GiB of memory, "
        f"{available / 2**30:.1f} GiB is available; {advice}"
    )


def _meminfo() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_folders() -> list[Path]:
    """This process's memory cgroup and its parents, version 2 and version 1."""
    folders = []
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        own = root / path.lstrip("/")
        folders += [folder for folder in (own, *own.parents) if folder == root or root in folder.parents]
    return folders


def _cgroup_room(folder: Path) -> int | None:
    """Limit less use of one cgroup; page cache that can be dropped does not count as use."""
    for limit_file, use_file, cache_field in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, use = _number(folder / limit_file), _number(folder / use_file)
        if limit is None or use is None:
            continue
        fields = dict(line.split() for line in _lines(folder / "memory.stat"))
        return max(0, limit - use + int(fields.get(cache_field, 0)))
    return None


def _number(path: Path) -> int | None:
    lines = _lines(path)
    # "max" is version 2's word for no limit.
    return int(lines[0]) if lines and lines[0].strip().isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
