"""Registered backbones in jobs: found by the names that requests call them, or said not to be.

They are used as they are: what trains a network is no method for one.
"""

from collections.abc import Iterable

from service import backbones as registry
from service.contract import (
    FROZEN_TECHNIQUES,
    Baseline,
    DomainAdaptation,
    Method,
    ModelBased,
    PretrainedBackbone,
)
from service.errors import InvalidInput, Reason
from service.jobs.settings import Settings
from service.jobs.weights import trains_network
from service.storage.backbone_rows import not_found

_TRAINED: tuple[Baseline, ...] = ("full_fine_tune", "from_scratch")


def named(settings: Settings, name: str, tenant: str) -> PretrainedBackbone | None:
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


def choices(
    settings: Settings, method: Method, baselines: Iterable[Baseline], tenant: str
) -> list[PretrainedBackbone]:
    """Returns a tenant's backbones that a job may choose from: all, or none where it trains one."""
    is_trained = trains_network(method) or not set(_TRAINED).isdisjoint(baselines)
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
        raise InvalidInput(
            Reason.INVALID_FIELD,
            f"{name} is a registered file, and its weights are in it: leave weights empty",
            field=f"{at}weights",
        )
    if isinstance(method, ModelBased):
        raise InvalidInput(
            Reason.INVALID_FIELD,
            f"{what}, and model_based trains one: use feature_based or auto, or a backbone that "
            "comes with Graft",
            field="model_based",
        )
    if isinstance(method, DomainAdaptation) and trains_network(method):
        raise InvalidInput(
            Reason.INVALID_FIELD,
            f"{what}, and the technique {method.technique} trains one: leave the technique to the "
            f"service, or use one of {', '.join(FROZEN_TECHNIQUES)}",
            field="domain_adaptation.technique",
        )
    if trained := [each for each in baselines if each in _TRAINED]:
        raise InvalidInput(
            Reason.INVALID_FIELD,
            f"{what}, and the baseline {trained[0]} trains one: leave it out",
            field="baselines",
        )
