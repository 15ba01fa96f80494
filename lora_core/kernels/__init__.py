"""Numba and torch.compile kernels, and the choice of kernels for a device."""
