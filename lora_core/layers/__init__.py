"""Layers that compute many adapters at once: linears, norms, rotary embeddings, heads."""
