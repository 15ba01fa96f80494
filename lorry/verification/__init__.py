"""Offline verification of adapters, lineage and signatures."""
