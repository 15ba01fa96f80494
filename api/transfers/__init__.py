"""Uploads and downloads of files and adapters."""
