# Generated from graftml/_async by clients/generate_sync.py: edit that, and `make generate`.
"""The client in asyncio, of which `graftml._sync` is generated: `make generate`."""
