"""Stored content: content-addressed blobs, manifests that name them, users' files and uploads, and the token cache."""
