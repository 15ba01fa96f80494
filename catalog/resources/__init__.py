"""Resource requirements of jobs: memory, sharding, throughput. All modules except `requirements` are pure."""
