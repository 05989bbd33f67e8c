"""The Triton kernels, one module an operation; importing one imports triton."""
