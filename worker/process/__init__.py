"""Start, confine, watch and end child processes."""
