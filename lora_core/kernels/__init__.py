"""Numba and Triton kernels, and the choice of kernels for a device."""
