"""Open a sqlite store to read it, also one whose writer was killed."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

BUSY_TIMEOUT_S = 60


@contextlib.contextmanager
def open_to_read(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a sqlite file to read it, while others write to it; close it at the end.

    A writer that was killed leaves a journal. The next reader undoes what that writer had half
    done, and for this it has to write: a file opened with `mode=ro` fails instead with "attempt to
    write a readonly database" (https://sqlite.org/lockingv3.html, "hot journal"). So the file is
    opened to be written as well, and statements that would change it are refused. A file that
    nobody may write to is opened to be read alone; sqlite does this itself.

    Raises sqlite3.Error where there is no such file, or it cannot be read.
    """
    uri = f"file:{quote(str(path))}?mode=rw"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S)) as connection:
        connection.execute("PRAGMA query_only = ON")
        yield connection
