"""Stubs of the gRPC contract, generated from proto/graft/ by `make generate`."""
