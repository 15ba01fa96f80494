"""Layers that serve many adapters at once: linears, norms, rotary embeddings, heads."""
