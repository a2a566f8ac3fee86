"""A tiny model and small data files for the tests of training; nothing touches the user's caches."""

from helpers.fixtures import _own_cache, jsonl, llama

__all__ = ["_own_cache", "jsonl", "llama"]
