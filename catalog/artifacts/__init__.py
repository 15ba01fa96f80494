"""Files that outlive a process: content-addressed blobs, and manifests that name them. Knows no tables."""

from catalog.artifacts.manifest import DamagedArtifact, Manifest, ManifestFile
from catalog.artifacts.store import ArtifactStore, Blob, open_store

__all__ = ["ArtifactStore", "Blob", "DamagedArtifact", "Manifest", "ManifestFile", "open_store"]
