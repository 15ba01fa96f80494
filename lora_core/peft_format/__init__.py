"""Adapters in PEFT's layout: export, import, verification."""
