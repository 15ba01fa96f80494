"""Models and adapters as GGUF files of llama.cpp: writing and verification."""
