"""Watches llama-server: where it ends, the guard ends; where it stops responding, it is started again.

A grammar within the limits can still take llama-server's one loop for minutes in one token, and with it everybody's
answers, or ever more memory: three quarters of what was free when it was ready are enough. /metrics is answered between
two steps of that loop, also while a picture is encoded or a prompt is read (server-queue.cpp, ``yield_to_queue``), so
no answer to it means that the loop stands still.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from qap_gguf.errors import ModelFileError
from qap_gguf.serve.child import Child
from qap_gguf.serve.health import EVERY_S, PROBE_EVERY_S, most_memory, seconds_to_stall
from qap_gguf.serve.problems import RefusedError

if TYPE_CHECKING:
    from qap_gguf.serve.app import Application

log = logging.getLogger("qap_gguf.serve")


def watcher(
    child: Child, ended: Callable[[str], None], stalled_seconds: float | None = None
) -> Callable[[Application], Coroutine[Any, Any, None]]:
    """What :class:`~qap_gguf.serve.app.Application` runs beside its routes.

    Args:
        child: llama-server, running.
        ended: told in one line why there is no llama-server any more.
        stalled_seconds: see :func:`seconds_to_stall`.
    """
    seconds = seconds_to_stall(stalled_seconds)

    async def responds(app: Application) -> bool:
        with anyio.move_on_after(seconds):
            try:
                async with app.upstream.send("GET", "/metrics") as reply:
                    await reply.read()
            except RefusedError:
                return child.status is None  # it ended, which is seen next
            return True
        return False

    async def watch(app: Application) -> None:
        probed, most = time.monotonic(), most_memory(child)
        while True:
            await anyio.sleep(EVERY_S)
            why = None
            if child.status is not None:
                ended(f"llama-server ended ({child.last_words()})")
                return
            if child.anonymous() > most:
                why = f"took {child.anonymous() / 2**30:.1f} GiB of memory"
            elif app.n_now and time.monotonic() - probed >= min(PROBE_EVERY_S, seconds):
                why = None if await responds(app) else f"stood still for {seconds:g} seconds"
                probed = time.monotonic()
            if why is not None:
                log.warning("llama-server %s; it is started again", why)
                app.metrics.add("restarts_total")
                try:
                    child.spawn()
                    await anyio.to_thread.run_sync(child.wait_until_ready)
                except ModelFileError as err:
                    ended(str(err))
                    return

    return watch
