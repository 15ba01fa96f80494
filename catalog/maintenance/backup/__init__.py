"""A copy of the record and of the files that it names, and the way back.

Files, then the database, then the files that came meanwhile: docs/OPERATIONS.md says why that is consistent.
"""

from catalog.maintenance.backup.create import Made, make
from catalog.maintenance.backup.location import BackupPlace, open_place
from catalog.maintenance.backup.restore import Restored, restore
from catalog.maintenance.backup.verify import Checked, check

__all__ = ["BackupPlace", "Checked", "Made", "Restored", "check", "make", "open_place", "restore"]
