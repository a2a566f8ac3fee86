"""PEFT's side of flashbone: configuration, layers, model, and their registration."""

# First, before any module of this package: importing peft runs the registration, which imports them all.
import peft as _peft  # noqa: F401
