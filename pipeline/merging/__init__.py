"""Adapters bound to the weights of a checkpoint, and the weights that come of it."""
