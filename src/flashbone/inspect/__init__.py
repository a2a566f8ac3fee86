"""What a model would be adapted with, and what an adapter file holds: data first, then tables."""
