"""The folder of compiled libraries, and of what was measured once. Its files are executed and believed, so only the user may write to it.

A library's name ends with a digest of its bytes, which is checked before it is loaded. One that is damaged, empty or somebody else's is
moved aside. A measurement is a small file of text under a name of its own; the first one that is kept under a name stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

from longattn.patterncache.spans import shortened

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger("longattn.kernels")

_ASIDE, _WORKSHOP = ".damaged", "building-"


def cache_folder() -> Path | str:
    """LONGATTN_CACHE, or longattn in the user's cache folder; or why that is no folder to keep libraries in."""
    path = os.environ.get("LONGATTN_CACHE")
    if path:
        # A shell that did not expand it would have us write into a folder called "~".
        return Path(path) if os.path.isabs(path) else f"LONGATTN_CACHE must be an absolute path, got {shortened(path)}"
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # its specification: a relative path is to be ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        return "there is no cache folder: this user has no home; LONGATTN_CACHE names one"
    return Path(base) / "longattn"


def refusal_of(folder: Path) -> str | None:
    """Why nothing in the folder may be loaded; None also where it is not there yet."""
    try:
        status = folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as problem:
        return f"the cache folder {folder} cannot be read: {problem.strerror}; LONGATTN_CACHE names another"
    wrong = None
    if stat.S_ISLNK(status.st_mode):
        wrong = "is a symbolic link"
    elif not stat.S_ISDIR(status.st_mode):
        wrong = "is no folder"
    elif not _ours(status):
        wrong = f"belongs to user {status.st_uid}"
    elif _writable_by_others(status):
        wrong = f"is writable by others (mode {stat.S_IMODE(status.st_mode):o}, 700 would do)"
    return wrong and f"the cache folder {folder} {wrong}; LONGATTN_CACHE names another"


def unwritable(folder: Path) -> str | None:
    """Why nothing can be put into the folder, as far as looking tells."""
    existing = next((ancestor for ancestor in (folder, *folder.parents) if os.path.lexists(ancestor)), folder)
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return None
    return f"the cache folder {folder} cannot be written; LONGATTN_CACHE names another"


def make(folder: Path) -> None:
    """Make the folder where it is missing, and check that it belongs to this user alone.

    Raises:
        OSError: it cannot be made.
        PermissionError: it is not ours alone.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    wrong = refusal_of(folder)
    if wrong is not None:
        raise PermissionError(wrong)


def find(folder: Path, stem: str) -> Path | None:
    """The intact library of that stem, if there is one. Damaged ones of that name are moved aside."""
    if refusal_of(folder) is not None or not folder.is_dir():
        return None
    for path in sorted(folder.glob(f"{stem}.*.so")):
        with contextlib.suppress(FileNotFoundError):  # another process was first
            if is_whole(path):
                return path
            set_aside(path, "is not what was compiled")
    return None


@contextlib.contextmanager
def workshop(folder: Path, longest_s: float) -> Generator[Path, None, None]:
    """A folder within for what is being made. Other processes wait, where the system locks folders; what killed ones left is removed.

    Raises:
        TimeoutError: another process has been at it for longer than `longest_s`.
        OSError: the folder cannot be written.
    """
    with contextlib.ExitStack() as held:
        if fcntl is not None:
            file = os.open(folder, os.O_RDONLY)
            held.callback(os.close, file)
            if _lock(file, longest_s):
                for left in folder.glob(f"{_WORKSHOP}*"):
                    shutil.rmtree(left, ignore_errors=True)
        yield Path(held.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=_WORKSHOP)))


def _lock(file: int, longest_s: float) -> bool:
    """Lock a folder until its file is closed; False where its file system has no locks, as some over a network: then each process makes its own."""
    assert fcntl is not None
    until = time.monotonic() + longest_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                raise TimeoutError(f"another process has been at it for longer than {longest_s:g} s") from None
            time.sleep(0.05)
        except OSError:
            return False


def is_whole(path: Path) -> bool:
    """Whether a file is this user's alone and has the digest that its name states."""
    return _ours_alone(path.lstat()) and path.name.split(".")[-2] == digest(path)


def set_aside(path: Path, why: str) -> None:
    """Rename a file so that it is not found again."""
    logger.warning("cache folder: %s %s; it is now %s%s", path, why, path.name, _ASIDE)
    os.replace(path, path.with_name(path.name + _ASIDE))


def keep(compiled: Path, folder: Path, stem: str) -> Path:
    """Move a library into the folder. It is flushed to disk before it gets its name, so that no process, and no crash, leaves half a file."""
    with open(compiled, "rb") as file:
        os.fsync(file.fileno())
    compiled.chmod(0o700)  # a compiler follows the umask, which may let others write
    target = folder / f"{stem}.{digest(compiled)}.so"
    os.replace(compiled, target)
    return target


def read_text(folder: Path, name: str) -> str | None:
    """What is kept under a name, or None: nothing, nothing of this user alone, or a folder that is not ours alone."""
    if refusal_of(folder) is not None:
        return None
    path = folder / name
    try:
        about = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not _ours_alone(about):
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def keep_text(folder: Path, name: str, text: str) -> str:
    """Keep a text under a name, and return what is kept there now: of two processes that keep at once, both get what the first one kept.

    Raises:
        OSError: the folder cannot be made or written, or is not ours alone.
    """
    make(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix="keeping-") as own:
        made = Path(own) / "text"
        made.write_text(text, encoding="utf-8")
        made.chmod(0o600)
        try:
            os.link(made, folder / name)
        except FileExistsError:
            earlier = read_text(folder, name)
            if earlier is not None:
                return earlier
            os.replace(made, folder / name)  # somebody else's file, which is not believed
    return text


def digest(path: Path) -> str:
    """The digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _ours(status: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()


def _writable_by_others(status: os.stat_result) -> bool:
    return os.name == "posix" and bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _ours_alone(status: os.stat_result) -> bool:
    """Whether a file, and no link to one, may be written by this user alone."""
    return stat.S_ISREG(status.st_mode) and _ours(status) and not _writable_by_others(status)
