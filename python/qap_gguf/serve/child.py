"""llama-server as a child process: its options, its start, its end.

It listens on the loopback with a key that only this process knows. It writes to a pipe whose last lines are kept for
errors. On Linux it ends with this process, however that ends.
"""

from __future__ import annotations

import collections
import ctypes
import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import qap_gguf
from qap_gguf.config import PruneConfig
from qap_gguf.errors import ConfigError, ModelFileError

_PR_SET_PDEATHSIG: Final = 1
#: It may miss a SIGTERM that comes before its loop runs (server.cpp), and has nothing to save.
_SECONDS_TO_STOP: Final = 2.0
_LAST_LINES: Final = 40


def find_program(name: str = "llama-server") -> Path:
    """The program in the package.

    Raises:
        ConfigError: the package was built without it.
    """
    path = Path(next(iter(qap_gguf.__path__))) / "bin" / name
    if not path.is_file():
        raise ConfigError(
            f"serve: expected {name} at {path}, found none; run make programs in a checkout, or pip install with "
            "--config-settings=cmake.define.QAP_PROGRAMS=ON"
        )
    return path


def prune_environment(config: PruneConfig) -> dict[str, str]:
    """The variables that make llama-server prune so: one for each field (native/src/param-words.cpp), empty for none.

    Example:
        >>> found = prune_environment(PruneConfig(n_keep=18))
        >>> found["QAP_N_KEEP"], found["QAP_KEEP_RATIO"]
        ('18', '')
    """
    return {f"QAP_{name.upper()}": "" if value is None else str(value) for name, value in config.to_dict().items()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _dies_with_parent() -> Any:
    """What the child does before it becomes llama-server; None where the system has no such thing."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # loaded here: after the fork only the call itself is safe
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """A llama-server.

    Args:
        options: its command line, without address and key.
        env: variables of its environment, over those of this process.
        verbose: let its log through to stderr.

    Attributes:
        port: where it listens, on 127.0.0.1.
        key: its API key.
    """

    def __init__(self, options: Sequence[str], env: Mapping[str, str], *, verbose: bool = False) -> None:
        self._program, self._options, self._verbose = find_program(), list(options), verbose
        self.port, self.key = _free_port(), secrets.token_urlsafe(32)
        self._env = {**os.environ, **env, "LLAMA_API_KEY": self.key}
        self._env.pop("LLAMA_MEDIA_MARKER", None)  # one that clients cannot guess is made at each start
        self._lines: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it, and wait until it has loaded the model.

        Raises:
            ModelFileError: it ends before that.
        """
        self.spawn()
        self.wait_until_ready()

    def spawn(self) -> None:
        """Start it, in place of one that ran. The thread that calls this must live as long as it shall."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        command = [str(self._program), *self._options, "--host", "127.0.0.1", "--port", str(self.port)]
        self._process = subprocess.Popen(
            command,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_dies_with_parent(),  # noqa: PLW1509 - one system call, looked up before the fork
        )
        threading.Thread(target=self._read, args=(self._process,), name="qap-llama-server", daemon=True).start()

    def wait_until_ready(self) -> None:
        """Until it has loaded the model.

        Raises:
            ModelFileError: it ends before that.
        """
        while not self._is_ready():
            if self.status is not None:
                raise ModelFileError(f"llama-server ended while it loaded the model ({self.last_words()}); see --debug")
            time.sleep(0.02)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr as log:
            for line in log:
                self._lines.append(line.rstrip())
                if self._verbose:
                    sys.stderr.write(line)

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    @property
    def status(self) -> int | None:
        """How it ended: its exit status, or less the signal; None while it runs."""
        return None if self._process is None else self._process.poll()

    def anonymous(self) -> int:
        """Bytes of memory that are its own, without the mapped model; 0 where the system does not say."""
        try:
            lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines() if self._process else []
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
        except OSError:
            return 0

    def last_words(self) -> str:
        """The last of its log that says what went wrong, in one line."""
        status = self.status
        ended = f"status {status}" if status is None or status >= 0 else f"signal {-status}"
        told = [line for line in self._lines if " E " in line or "error" in line.lower()] or list(self._lines)
        return f"{ended}: {' '.join(told[-1].split())[:300]}" if told else ended

    def terminate(self) -> None:
        """Ask it to end, from any thread; :attr:`status` tells when it has."""
        process = self._process
        if process is not None:
            process.terminate()

    def close(self) -> None:
        """End it, by force if it does not end in time."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
