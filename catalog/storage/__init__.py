"""Stored content: content-addressed blobs, manifests that list them, users' files and uploads, and the token cache."""
