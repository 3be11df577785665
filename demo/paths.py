"""The parent's side of the worker processes: one fresh process per path measures that path's time and memory."""

import json
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from demo.options import Options
from demo.refusal import RefusalError

_ROOT = Path(__file__).resolve().parent.parent


class PathProcess(AbstractContextManager["PathProcess"]):
    """A worker process for one path.

    1. Constructed: the process starts; `ready` is its first answer, waited for when first asked.
    2. `ask` sends one request and waits for its answer; requests of two processes alternate, so pairs interleave.
    3. `close`, or leaving the `with` block, ends its input and with it the process; an error kills it.
    """

    def __init__(self, path: str, options: Options, text_file: Path) -> None:
        """Start the worker; what it writes to standard error is kept beside `text_file`."""
        self.path = path
        # A file, not a pipe: a long traceback must not block the worker while nobody reads.
        self._errors = text_file.with_name(f"{path}.stderr")
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "demo.worker", path, options.to_json(), str(text_file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=_ROOT,
            )
        self._ready: dict[str, Any] | None = None

    def ready(self) -> dict[str, Any]:
        """Wait until the inputs are built; returns what the worker says about itself.

        Raises:
            RefusalError: the worker cannot run here, or ended.
        """
        if self._ready is None:
            self._ready = self._answer()
        return self._ready

    def ask(self, request: str) -> dict[str, Any]:
        """Send "run" or "check" and wait for the answer.

        Raises:
            RefusalError: the worker ended instead of answering; the message ends with its last words.
        """
        self.ready()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        return self._answer()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self.close()

    def close(self) -> None:
        """End the process by ending its input, and wait for it; a second call does nothing."""
        assert self._process.stdout is not None
        if not self._process.stdout.closed:
            self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        reply: dict[str, Any] = json.loads(line)
        if "refusal" in reply:
            raise RefusalError(reply["refusal"])
        return reply

    def _ended(self) -> RefusalError:
        code = self._process.wait()
        words = [line for line in self._errors.read_text().splitlines() if line.strip()]
        if code == -signal.SIGKILL:
            return RefusalError(
                f"the process of path {self.path!r} was killed, most likely for memory; pass a smaller --seq-len"
            )
        return RefusalError(
            f"the process of path {self.path!r} ended with status {code}: {words[-1] if words else 'no message'}"
        )
