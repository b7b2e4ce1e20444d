"""gRPC, and nothing but: the only room that imports grpc. Stops when the server stops."""
