"""GPU and CPU kernels behind torch operators; knows torch, triton and nothing else of the project."""
