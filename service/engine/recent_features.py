"""Keeps the features of images that were classified lately, in memory, bounded in bytes.

An image that comes again, to whatever model on the same backbone, needs no decoding and no run:
it costs a digest and a head. Features are found by tenant, by the image's digest, by how it is
decoded and by the backbone's digest. By tenant, since an answer that comes at once would show
that somebody else has sent that image. Where the bound is passed, the tenant with the most
bytes loses what it used longest ago, so that no tenant's images push out those of another that
keeps fewer.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from service.domain import ImageDecoding
from service.engine.head import Floats
from service.ops.metrics import Metrics

_ENTRY_BYTES = 400
"""Bytes that an entry takes beside its features, about: keys, links, an array's header."""


class Known(NamedTuple):
    """Names the features of one image, among those of its tenant."""

    image: bytes
    """As `preprocess.Encoded.digest` makes it."""
    decoding: ImageDecoding
    backbone: str


@dataclass
class _Tenant:
    features: OrderedDict[Known, Floats] = field(default_factory=OrderedDict)
    nbytes: int = 0


class RecentFeatures:
    """Maps images to features float32 [d]; every method may be called from any thread."""

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._hits = metrics.recent_features.labels("hit")
        self._misses = metrics.recent_features.labels("miss")
        metrics.recent_features_limit.set(max_bytes)
        self._tenants: dict[str, _Tenant] = {}
        """Those of which anything is kept."""
        self._nbytes = 0
        self._guard = threading.Lock()
        """Held while references move, never while anything is computed."""

    def get(self, tenant: str, known: Known) -> Floats | None:
        """Returns an image's features, which must not be changed; counts as a use."""
        with self._guard:
            own = self._tenants.get(tenant)
            found = None if own is None else own.features.get(known)
            if own is not None and found is not None:
                own.features.move_to_end(known)
        (self._misses if found is None else self._hits).inc()
        return found

    def put(self, tenant: str, known: Known, features: Floats) -> None:
        """Keeps an image's features, which must not be changed from then on."""
        with self._guard:
            if tenant in self._tenants and known in self._tenants[tenant].features:
                self._drop(tenant, known)
            own = self._tenants.setdefault(tenant, _Tenant())
            own.features[known] = features
            self._count(own, _size(features))
            while self._nbytes > self._max_bytes:
                largest = max(self._tenants, key=lambda name: self._tenants[name].nbytes)
                self._drop(largest, next(iter(self._tenants[largest].features)))
            self._metrics.recent_features_bytes.set(self._nbytes)

    def forget(self, tenant: str, image_digest: str) -> None:
        """Drops what is kept of a tenant's image file, by its sha256 in hexadecimal digits.

        Of an empty digest everything of everybody is dropped: nobody knows what was erased.
        """
        with self._guard:
            if not image_digest:
                self._tenants.clear()
                self._nbytes = 0
            elif (own := self._tenants.get(tenant)) is not None:
                image = bytes.fromhex(image_digest)
                for known in [known for known in own.features if known.image == image]:
                    self._drop(tenant, known)
            self._metrics.recent_features_bytes.set(self._nbytes)

    def _drop(self, tenant: str, known: Known) -> None:
        own = self._tenants[tenant]
        self._count(own, -_size(own.features.pop(known)))
        if not own.features:
            del self._tenants[tenant]

    def _count(self, own: _Tenant, nbytes: int) -> None:
        own.nbytes += nbytes
        self._nbytes += nbytes


def _size(features: Floats) -> int:
    return features.nbytes + _ENTRY_BYTES
