"""A simulated queue and workload, to test the scheduler over days."""
