"""Layers with adapters: one file for each kind of base layer, and what merging and mixed batches do to them."""
