"""Passes of a pack through the model: language modeling, classification, generation."""
