"""What the C++ kernels share: instruction-set selection, vectors, and the ctypes loader."""
