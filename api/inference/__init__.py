"""Inference requests in the API server: answers of workers, and responses in OpenAI's format."""
