"""The version of the installed distribution."""

from functools import cache
from importlib import metadata


@cache
def version() -> str:
    """As in pyproject.toml; "unknown" where the package runs without being installed."""
    try:
        return metadata.version("graftml")
    except metadata.PackageNotFoundError:
        return "unknown"
