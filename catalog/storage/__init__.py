"""Files that outlive a process: content-addressed blobs, and manifests that name them. Knows no tables."""

from catalog.storage.manifest import DamagedArtifact, Manifest, ManifestFile
from catalog.storage.store import ArtifactStore, Blob, open_store

__all__ = ["ArtifactStore", "Blob", "DamagedArtifact", "Manifest", "ManifestFile", "open_store"]
