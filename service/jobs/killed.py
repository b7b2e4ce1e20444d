"""Why a trainer was killed by SIGKILL, as far as the kernel tells.

Counts before a trainer starts and looks again after its end. Knows no jobs. Blocks no
longer than the kernel takes to answer, and raises nothing.
"""

from service.ops import cgroups

_MIB = 2**20


class Deaths:
    """Those for want of memory in the service's control group, from now on."""

    def __init__(self) -> None:
        self._before = cgroups.kill_count()

    def why_killed(self, remedy: str) -> str:
        """What callers are told of a trainer that ended by SIGKILL; `remedy` is what to use.

        Certain where the kernel has killed somebody since, a trainer in all likelihood;
        else a guess, which says so.
        """
        now = cgroups.kill_count()
        if self._before is None or now is None or now <= self._before:
            return (
                "the trainer was killed (SIGKILL), as the system does when memory runs out: "
                f"{remedy}, or give the server more memory, unless somebody killed it"
            )
        limit = cgroups.limit_bytes()
        of_what = "" if limit is None else f" than the {limit / _MIB:.0f} MiB of its control group"
        return (
            "the system killed the trainer because memory ran out: "
            f"{remedy}, or give the server more memory{of_what}"
        )
