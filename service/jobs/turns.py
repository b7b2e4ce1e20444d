"""One turn at a time, given to the tenants that wait for it one after the other."""

import asyncio


class Turns:
    """Gives out one turn at a time, on one event loop.

    The next turn goes to the tenant whose last one began the longest ago, and of a tenant to
    whoever asked first.
    """

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._last: dict[str, int] = {}
        """The number of each tenant's last turn; forgotten when nobody waits."""
        self._count = 0

    async def take(self, tenant: str) -> None:
        """Waits for the turn; whoever gets it gives it back."""
        if not self._is_taken:
            self._give(tenant)
            return
        given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        mine = (tenant, given)
        self._waiting.append(mine)
        try:
            await given
        except asyncio.CancelledError:
            if mine in self._waiting:
                self._waiting.remove(mine)
            else:
                # It was given just before.
                self.give_back()
            raise

    def give_back(self) -> None:
        """Ends the turn, and gives it to the next tenant."""
        # Whoever was cancelled has not left the list before its task runs again.
        waiting = [mine for mine in self._waiting if not mine[1].done()]
        if not waiting:
            self._is_taken = False
            self._last.clear()
            return
        tenant, given = mine = min(waiting, key=lambda mine: self._last.get(mine[0], 0))
        self._waiting.remove(mine)
        self._give(tenant)
        given.set_result(None)

    def _give(self, tenant: str) -> None:
        self._is_taken = True
        self._count += 1
        self._last[tenant] = self._count
