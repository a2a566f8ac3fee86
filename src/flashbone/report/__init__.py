"""Reports: data first, then tables and plots."""
