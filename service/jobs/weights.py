"""Names the weights that a job can start from, and finds out whether they are available.

Registered backbones are found by the names that requests call them, or said not to be. They are
used as they are: what trains a network is not a method for one. Knows the names of files, and reads
none.
"""

import math
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from pathlib import Path

from service import backbones as registry
from service.backbones import BACKBONES, FILE, HOSTS, Backbone, find
from service.contract import (
    FROZEN_TECHNIQUES,
    NETWORK_TECHNIQUES,
    Baseline,
    DomainAdaptation,
    ExportedBackbone,
    Method,
    ModelBased,
    PretrainedBackbone,
)
from service.errors import Reason, WrongState, bad_field
from service.jobs.settings import Settings
from service.storage.backbone_rows import not_found

Exports = Callable[[str], list[ExportedBackbone]]
"""From a backbone to the pretrained forms of it that earlier jobs exported."""

_CONNECT_S = 3.0
"""For one look at whether a host can be reached, with the look-up of its name."""
_REMEMBERED_S = 60.0
"""How long the last look counts."""
TRAINED_BASELINES: frozenset[Baseline] = frozenset({"full_fine_tune", "from_scratch"})


def available(folder: Path, exported: Exports) -> list[PretrainedBackbone]:
    """The backbones whose weights lie in `folder` or are installed, each with its exports."""
    return [
        PretrainedBackbone(backbone=name, exported=exported(name))
        for name, row in BACKBONES.items()
        if is_here(folder, row.weights_file(row.weights_name("")))
    ]


def is_here(folder: Path, file: str) -> bool:
    """Tells whether a file, or one that fits a pattern, lies in a folder; "" needs none."""
    try:
        return any(folder.glob(file)) if "*" in file else not file or (folder / file).exists()
    except PermissionError:
        return True  # and the trainer says what to do


class WeightsCheck:
    """Finds out before a job begins whether its weights can be had. Safe from any thread.

    `may_connect` is False where downloads go through a proxy, or to another host: whether
    that lets them through is not tried.
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
        self._looked: dict[str, tuple[float, bool]] = {}
        """When each host was looked at last, of time.monotonic, and whether it was there."""

    def check(self, backbone: str, weights: str, method: Method, exported: Exports) -> None:
        """Raises WrongState (WEIGHTS_UNAVAILABLE) where a job would need a download that fails.

        For names that were checked. Waits for the network, 3 s at most.
        """
        row = find(backbone)
        assert row is not None
        name = row.weights_name(weights)
        file = row.weights_file(name)
        if is_here(self._folder, file):
            return
        if name.startswith(FILE):
            raise WrongState(
                Reason.WEIGHTS_UNAVAILABLE,
                f"there is no file {file} in the server's folder of weights (GRAFT_WEIGHTS_DIR): "
                "ask its operator to put it there",
                field="weights",
            )
        if not trains_network(method) and any(e.weights == name for e in exported(backbone)):
            return
        host = HOSTS[row.source]
        if not self._may_connect or self._can_download(host):
            return
        raise WrongState(
            Reason.WEIGHTS_UNAVAILABLE,
            f"the weights {name} of {backbone} are not on the server, and {host}, where they are "
            f"downloaded from, cannot be reached: ask its operator to put {_described(row, file)} "
            "into the folder of weights (GRAFT_WEIGHTS_DIR), or use one of "
            f"{', '.join(p.backbone for p in available(self._folder, exported))}",
            field="backbone",
        )

    def _can_download(self, host: str) -> bool:
        # One at a time: callers that come meanwhile take what the first one found.
        with self._lock:
            looked_s, found = self._looked.get(host, (-math.inf, False))
            if time.monotonic() - looked_s > _REMEMBERED_S:
                found = self._is_reachable(host)
                self._looked[host] = time.monotonic(), found
            return found


def _described(row: Backbone, file: str) -> str:
    if row.source != "timm":
        return file
    return f"{row.network}'s model.safetensors of huggingface.co/timm as {file.replace('*', 'TAG')}"


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


def find_registered(settings: Settings, name: str, tenant: str) -> PretrainedBackbone | None:
    """Returns what is known of a registered backbone; None for a name of another kind.

    Raises NotFound (BACKBONE_NOT_FOUND) where the tenant has none of that name.
    """
    if not registry.is_registered(name):
        return None
    known = settings.registered_of(tenant)
    found = next((each for each in known if each.backbone == name), None)
    if found is None:
        raise not_found(name, [each.backbone for each in known])
    return found


def registered_choices(
    settings: Settings, method: Method, baselines: Iterable[Baseline], tenant: str
) -> list[PretrainedBackbone]:
    """Returns a tenant's backbones that a job may choose from: all, or none where it trains one."""
    is_trained = trains_network(method) or not TRAINED_BASELINES.isdisjoint(baselines)
    return [] if is_trained else settings.registered_of(tenant)


def check_registered(
    name: str,
    weights: str,
    method: Method | None = None,
    baselines: Iterable[Baseline] = (),
    *,
    at: str = "",
) -> None:
    """Raises InvalidInput for what a registered backbone cannot be used for; nothing for others.

    `at` is the place in the request, such as "backbones[0].", before the field's name.
    """
    if not registry.is_registered(name):
        return
    what = f"{name} is a registered file, whose network is used as it is"
    if weights:
        raise bad_field(
            f"{at}weights",
            f"{name} is a registered file, and its weights are in it: leave weights empty",
        )
    if isinstance(method, ModelBased):
        raise bad_field(
            "model_based",
            f"{what}, and model_based trains one: use feature_based or auto, or a backbone that "
            "comes with Graft",
        )
    if isinstance(method, DomainAdaptation) and trains_network(method):
        raise bad_field(
            "domain_adaptation.technique",
            f"{what}, and the technique {method.technique} trains one: leave the technique to the "
            f"service, or use one of {', '.join(FROZEN_TECHNIQUES)}",
        )
    if trained := [each for each in baselines if each in TRAINED_BASELINES]:
        raise bad_field(
            "baselines", f"{what}, and the baseline {trained[0]} trains one: leave it out"
        )
