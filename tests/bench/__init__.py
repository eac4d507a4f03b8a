"""Benchmarks against the peers: ratios per CPU-second, interleaved, one thread."""
