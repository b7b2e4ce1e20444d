"""Pretrained weights from the network: within a time, held against their hash.

Nothing here takes longer than it may, whatever the network does; waiting for it is no
hanging (`liveness`).
"""

import http.client
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path

import torch

from service.errors import Reason, Unavailable
from trainer import liveness

TIMEOUT_S = 30.0
"""Of silence on the line, and of each of a host's addresses."""
LIMIT_S = 900.0
"""Of a whole download, with the look-up of the host's name: a line of 2 Mbit/s is enough."""
_MODE = 0o644
"""Anybody's to read: the weights are public, and servers of several users may share a folder."""


def download(url: str, path: Path, prefix: str) -> None:
    """Puts the file at a URL, whose sha256 begins with `prefix`, at a path.

    Raises Unavailable (WEIGHTS_UNAVAILABLE) where it cannot, or not in time.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with liveness.waiting(LIMIT_S + TIMEOUT_S):
            _within(LIMIT_S, lambda: _to_file(url, path, prefix))
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise Unavailable(
            Reason.WEIGHTS_UNAVAILABLE,
            f"the pretrained weights {path.name} are not in {path.parent} and could not be "
            f"downloaded from {url} ({error}): put the file there, allow the download, or use the "
            "backbone efficientnet_lite0, whose weights are installed with Graft",
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _to_file(url: str, path: Path, prefix: str) -> None:
    # Takes a temporary name until the hash fits.
    torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=False)
    path.chmod(_MODE)


def _within(limit_s: float, run: Callable[[], None]) -> None:
    """Runs it, or raises TimeoutError; what never ends is left behind in its thread.

    No timeout of a socket reaches the look-up of a name.
    """
    ended: Future[None] = Future()

    def work() -> None:
        try:
            run()
        except Exception as error:
            ended.set_exception(error)
        else:
            ended.set_result(None)

    threading.Thread(target=work, name="download", daemon=True).start()
    wait([ended], limit_s)
    if not ended.done():
        raise TimeoutError(f"it did not end within {limit_s:.4g} s")
    ended.result()
