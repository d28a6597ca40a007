"""Benchmarks: cells in, JSON lines out. Nothing here is part of the package."""
