"""The home cluster: a ring of layer windows."""
