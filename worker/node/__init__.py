"""The resources of this machine: devices, cgroups, utilization, scratch space."""
