"""Token datasets, the order of examples, and how batches are cut into slices. Independent of any model."""
