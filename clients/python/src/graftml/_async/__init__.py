"""The client in asyncio, of which `graftml._sync` is generated: `make generate`."""
