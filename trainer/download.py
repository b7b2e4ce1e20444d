"""Pretrained weights from the network: within a time, held against their hash.

Nothing here takes longer than it may, whatever the network does; waiting for it is no
hanging (`liveness`).
"""

import re
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path

import torch

from service.backbones import DEFAULT_BACKBONE
from service.errors import GraftError, InvalidInput, Reason, WrongState
from trainer import liveness

TIMEOUT_S = 30.0
"""Of silence on the line, and of each of a host's addresses."""
LIMIT_S = 900.0
"""Of a whole download, with the look-up of the host's name: a line of 2 Mbit/s is enough."""
HUB_FILE = "model.safetensors"
"""Where a repository of timm's on the Hugging Face Hub keeps its weights."""
MAX_HUB_BYTES = 2**31
"""An ONNX file, which holds the same weights, is at most as large."""
_MODE = 0o644
"""Anybody's to read: the weights are public, and servers of several users may share a folder."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def download(url: str, path: Path, prefix: str) -> None:
    """Puts the file at a URL, whose sha256 begins with `prefix`, at a path.

    Raises WrongState (WEIGHTS_UNAVAILABLE) where it cannot, or not in time.
    """
    _within_limit(url, path, lambda: _to_file(url, path, prefix))


def download_from_hub(repository: str, path: Path) -> None:
    """Puts a repository's weights from the Hugging Face Hub at a path, checked by their sha256.

    The hub tells the digest and the commit that has it. Raises as `download`, and InvalidInput
    (INVALID_FIELD) where they are too large for an ONNX file.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    # What runs this server is nobody's business.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    url = hf_hub_url(repository, HUB_FILE)

    def fetch() -> None:
        told = get_hf_file_metadata(url, timeout=TIMEOUT_S)
        if (told.size or 0) >= MAX_HUB_BYTES:
            raise InvalidInput(
                Reason.INVALID_FIELD,
                f"the weights of {repository} have {told.size} bytes, and a backbone that is "
                f"served fewer than {MAX_HUB_BYTES}: choose a smaller one",
                field="backbone",
            )
        if told.etag is None or not _SHA256.fullmatch(told.etag):
            raise RuntimeError("the hub tells no sha256 of it")
        revision = told.commit_hash
        _to_file(hf_hub_url(repository, HUB_FILE, revision=revision), path, told.etag)

    _within_limit(url, path, fetch)


def _within_limit(url: str, path: Path, work: Callable[[], None]) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with liveness.waiting(LIMIT_S + TIMEOUT_S):
            within(LIMIT_S, work)
    except (GraftError, MemoryError):
        raise
    except Exception as error:  # those of two clients of HTTP, which share no base class
        raise WrongState(
            Reason.WEIGHTS_UNAVAILABLE,
            f"the pretrained weights {path.name} are not in {path.parent} and could not be "
            f"downloaded from {url} ({error}): put the file there under this name, allow the "
            f"download, or use the backbone {DEFAULT_BACKBONE}, whose weights are installed with "
            "Graft",
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _to_file(url: str, path: Path, prefix: str) -> None:
    # Takes a temporary name until the hash fits.
    torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=False)
    path.chmod(_MODE)


def within(limit_s: float, run: Callable[[], None]) -> None:
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
