"""The reasoning runtime on one device."""
