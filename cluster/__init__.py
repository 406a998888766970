"""The home cluster: a ring of layer windows."""

import os

# gRPC's core writes to the terminal of its own accord; what matters is raised and told in our words.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
