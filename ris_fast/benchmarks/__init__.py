"""Measurements of this project and of its peers, shared by `ris-fast bench` and by the benchmarks under pytest."""
