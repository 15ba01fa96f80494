"""The faults of the matrix, by the part of the service that they affect."""
