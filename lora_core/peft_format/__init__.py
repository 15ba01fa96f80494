"""Adapters in PEFT's layout: export, loading of parents, verification."""
