"""Benchmarks of the operators and of the whole model, with a correctness gate before every time."""
