"""Keys of the models that tests name."""

from service.domain import DEFAULT_TENANT, ModelKey


def key(name: str, tenant: str = DEFAULT_TENANT) -> ModelKey:
    return ModelKey(tenant, name)


BIRDS = key("birds")
