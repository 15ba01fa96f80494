"""A full disk or quota is reported with the folder that the disk holds."""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import closing

import pytest

from catalog.disk import full_disk_named, out_of_space
from catalog.errors import OutOfSpace


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_named(number: int) -> None:
    with pytest.raises(OutOfSpace, match="disk that holds the data folder is full") as refused, full_disk_named():
        raise OSError(number, os.strerror(number))

    assert refused.value.code == "out_of_space"
    assert "the data folder or the artifact store is full" in out_of_space().message


def test_full_disk_is_named_while_sqlite_writes_a_file() -> None:
    with closing(sqlite3.connect(":memory:")) as file:
        file.execute("PRAGMA max_page_count=2")
        file.execute("create table content (x)")

        with pytest.raises(OutOfSpace, match="disk that holds the data folder is full"), full_disk_named():
            file.execute("insert into content values (zeroblob(100000))")
