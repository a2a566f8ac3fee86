"""The whole model: its configuration, which layers are targets, loading, and what users call."""
