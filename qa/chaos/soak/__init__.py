"""The soak: hundreds of jobs on one service, and every few seconds a fault that chance has drawn."""
