"""Commands that call models."""
