"""The serving process: answers RPCs, keeps models and jobs, starts trainers. Without torch."""

import os

# gRPC's core writes lines of its own, past the log: for each TLS handshake that fails, and for each
# header that it cannot parse. Whoever reaches the port could fill the disk. It reads this when it
# is imported, so nothing may be before.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
