"""Batches: files of inference requests that API processes answer in the background. Imports inference and storage."""
