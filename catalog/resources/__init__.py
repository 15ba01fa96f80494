"""What a job needs of a device: memory, sharding, throughput. Pure but for `requirements`."""
