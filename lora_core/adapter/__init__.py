"""One job's parameters, gradients and optimizer state as flat vectors."""
