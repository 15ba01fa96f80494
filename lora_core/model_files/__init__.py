"""Files of base models: import, GGUF, license, merge."""
