"""The blocking client and its handles, as the command takes them."""

from graftml._sync.client import Client
from graftml._sync.fine_tuning import JobHandle, RankingHandle

__all__ = ["Client", "JobHandle", "RankingHandle"]
