"""Many jobs on one base model: admit, step, evict, checkpoint."""
