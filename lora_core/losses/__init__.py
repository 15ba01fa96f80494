"""Cross-entropy, preference losses, KTO and scores."""
