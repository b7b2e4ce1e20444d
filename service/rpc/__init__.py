"""The gRPC interface: servicers, and what happens around every call."""
