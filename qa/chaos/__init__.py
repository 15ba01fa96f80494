"""Injects every fault of the matrix that this machine allows into a real service. An auditor then checks the result."""
