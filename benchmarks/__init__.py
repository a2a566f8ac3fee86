"""Time and memory of the methods, measured side by side; docs/benchmarks.md says how and what came of it."""
