"""Tests mirror the tree; `system` runs the whole, `architecture` guards the shape, `services` brings the servers."""
