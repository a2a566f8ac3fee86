"""Talking to a model, and having it answer rows, with any of several adapters or without."""
