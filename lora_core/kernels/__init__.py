"""Numba and torch.compile kernels, and which of them a device uses."""
