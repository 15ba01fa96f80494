"""Files of base models: import, GGUF, license, merging of adapters."""
