"""Boot a machine with two NUMA nodes under QEMU's emulation (TCG, no privileges) and run the placement checks in it.

    python -m tools.numa_guest [--prefix FOLDER] [--seconds N] [--dry-run]

Needs what Debian's qemu-system-x86, busybox-static and linux-image-amd64 install; --prefix is a folder into which these were
unpacked (`dpkg -x`) instead. The guest's root is this machine's, read-only over 9p, so it runs this Python and this checkout.
Exits with 0 where every check passed, 77 with a reason where no guest can be booted, 1 otherwise.
"""

from __future__ import annotations

import argparse
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CANNOT = 77
_MODULES = ("9p", "9pnet_virtio", "virtio_pci")
_PASSED = "numa_guest: every check passed"
_INIT = """#!/bin/busybox sh
for name in {modules}; do /bin/busybox insmod /modules/$name.ko; done
/bin/busybox mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=1048576 host /guest
/bin/busybox mount -t proc proc /guest/proc
/bin/busybox mount -t sysfs sys /guest/sys
/bin/busybox mount -t devtmpfs dev /guest/dev
/bin/busybox mkdir -p /guest/dev/shm
/bin/busybox mount -t tmpfs shm /guest/dev/shm
cd /
/bin/busybox chroot /guest /usr/bin/env -i PATH={path} TMPDIR=/dev/shm HOME=/dev/shm OMP_NUM_THREADS=1 \\
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 {python} {checks} && echo "{passed}"
/bin/busybox poweroff -f
"""


class CannotBootError(Exception):
    """Why no guest can be booted here."""


def find_tools(prefix: Path) -> tuple[Path, Path, Path, Path]:
    """Return QEMU, a kernel, the folder of its modules, and a static busybox. Raises CannotBootError."""
    qemu = shutil.which("qemu-system-x86_64", path=f"{prefix}/usr/bin:{prefix}/bin")
    busybox = shutil.which("busybox", path=f"{prefix}/usr/bin:{prefix}/bin")
    if qemu is None:
        raise CannotBootError("qemu-system-x86_64 is not installed")
    if busybox is None:
        raise CannotBootError("busybox-static is not installed")
    for kernel in sorted((prefix / "boot").glob("vmlinuz-*"), reverse=True):
        for folder in ("usr/lib/modules", "lib/modules"):
            modules = prefix / folder / kernel.name.removeprefix("vmlinuz-")
            if any(modules.rglob("9p.ko*")):
                return Path(qemu), kernel, modules, Path(busybox)
    raise CannotBootError("no kernel with 9p modules is installed (linux-image-amd64)")


def with_dependencies(modules: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Return modules by name in the order in which they load, the ones that they need first."""
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in loaded:
            return
        paths = [path for path in modules.rglob("*.ko*") if path.name.split(".")[0].replace("-", "_") == name]
        if not paths:
            return  # built into the kernel
        code = lzma.decompress(paths[0].read_bytes()) if paths[0].suffix == ".xz" else paths[0].read_bytes()
        depends = re.search(rb"\0depends=([\w,-]*)\0", code)
        for needed in depends[1].decode().split(",") if depends else ():
            if needed:
                load(needed.replace("-", "_"))
        loaded[name] = code

    for name in names:
        load(name)
    return loaded


def cpio(files: dict[str, tuple[int, bytes]]) -> bytes:
    """Return an archive in the kernel's initramfs format ("newc"): path -> mode and content."""

    def entries() -> Iterator[bytes]:
        for inode, (name, (mode, content)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))], start=1):
            fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
            header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
            yield header + bytes(-len(header) % 4) + content + bytes(-len(content) % 4)

    return b"".join(entries())


def initramfs(busybox: Path, modules: dict[str, bytes]) -> bytes:
    """Return the guest's first root: busybox, the modules, and a script that mounts this machine's root and runs the checks."""
    script = _INIT.format(
        modules=" ".join(modules),
        path=os.environ["PATH"],
        python=sys.executable,
        checks=ROOT / "tools" / "numa_guest_checks.py",
        passed=_PASSED,
    )
    folders = dict.fromkeys(("bin", "modules", "guest", "dev"), (16877, b""))
    files = {f"modules/{name}.ko": (0o100644, code) for name, code in modules.items()}
    return cpio(
        {**folders, **files, "bin/busybox": (0o100755, busybox.read_bytes()), "init": (0o100755, script.encode())}
    )


def boot(prefix: Path, seconds: int) -> bool:
    """Run the checks in a guest; return whether every one passed. What the guest prints is printed here."""
    qemu, kernel, modules, busybox = find_tools(prefix)
    environment = dict(os.environ)
    if prefix != Path("/"):
        folders = (prefix / "usr/lib/x86_64-linux-gnu", prefix / "lib/x86_64-linux-gnu")
        environment["LD_LIBRARY_PATH"] = ":".join(map(str, folders))
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "initramfs"
        archive.write_bytes(initramfs(busybox, with_dependencies(modules, _MODULES)))
        command = [
            str(qemu), "-L", str(prefix / "usr/share/qemu"), "-L", str(prefix / "usr/share/seabios"),
            "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "4G", "-no-reboot", "-nographic", "-nodefaults",
            "-serial", "stdio",
            "-object", "memory-backend-ram,size=2G,id=ram0", "-object", "memory-backend-ram,size=2G,id=ram1",
            "-numa", "node,nodeid=0,cpus=0,memdev=ram0", "-numa", "node,nodeid=1,cpus=1,memdev=ram1",
            "-numa", "dist,src=0,dst=1,val=20",
            "-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
            "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
            "-kernel", str(kernel), "-initrd", str(archive), "-append", "console=ttyS0 quiet panic=-1",
        ]  # fmt: skip
        guest = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
        )
        try:
            output, _ = guest.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            guest.kill()
            output, _ = guest.communicate()
            output += f"\nnuma_guest: stopped after {seconds} s"
    sys.stdout.write(output + "\n")
    return any(line.strip() == _PASSED for line in output.splitlines())


def main() -> int:
    """Read the arguments and boot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--prefix", type=Path, default=Path("/"), help="where qemu, busybox and the kernel are unpacked"
    )
    parser.add_argument("--seconds", type=int, default=900, help="stop the guest after this time")
    parser.add_argument("--dry-run", action="store_true", help="only see whether a guest can be booted")
    arguments = parser.parse_args()
    try:
        if arguments.dry_run:
            find_tools(arguments.prefix)
            return 0
        return 0 if boot(arguments.prefix.resolve(), arguments.seconds) else 1
    except CannotBootError as reason:
        sys.stdout.write(f"no guest here: {reason}\n")
        return CANNOT


if __name__ == "__main__":
    sys.exit(main())
