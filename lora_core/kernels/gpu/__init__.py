"""Triton kernels for CUDA devices. Only tables.py can be imported without Triton."""
