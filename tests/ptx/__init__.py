"""Compiled Triton kernels on a CPU: an executor for PTX, in NumPy. README.md explains it; begin with `executing`."""
