"""A copy of the record and of the files that it names, and the way back.

Files, then the database, then the files that came meanwhile: docs/OPERATIONS.md says why that is consistent.
"""

from catalog.backup.checking import Checked, check
from catalog.backup.making import Made, make
from catalog.backup.place import BackupPlace, open_place
from catalog.backup.restoring import Restored, restore

__all__ = ["BackupPlace", "Checked", "Made", "Restored", "check", "make", "open_place", "restore"]
