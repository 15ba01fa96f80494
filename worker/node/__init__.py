"""What this machine has: devices, cgroups, utilization, scratch space."""
