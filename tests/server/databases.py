"""Databases for tests of the store: SQLite in a folder, and a PostgreSQL of our own on a Unix socket.

The cluster lies in a folder of its own, listens on no port, and is stopped by the process id that it has written there.
"""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.server.brokers import wait_until

SUPERUSER: Final = "whimbrel"
USERS: Final = ("postgres", "nobody")
"""As whom PostgreSQL runs where the tests run as root, which it refuses."""

FAST: Final = ("fsync=off", "full_page_writes=off", "synchronous_commit=off", "max_connections=40")
"""A cluster that lives as long as some tests need survive no power cut."""


def _find_binaries() -> Path:
    """The newest PostgreSQL; Debian keeps each version in a folder that is on no path."""
    if (found := shutil.which("pg_ctl")) is not None:
        return Path(found).resolve().parent
    folders = Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")
    return max(folders, key=lambda path: float(path.parts[-3]), default=Path("/none/bin")).parent


BINARIES: Final = _find_binaries()


def _missing() -> str:
    """Why there is no PostgreSQL for tests; empty where there is one."""
    if not (BINARIES / "pg_ctl").exists():
        return "PostgreSQL is not installed (apt-get install postgresql)"
    if importlib.util.find_spec("psycopg") is None:
        return "the driver of PostgreSQL is not installed (pip install 'whimbrel[postgresql]')"
    return ""


POSTGRESQL_MISSING: Final = _missing()
POSTGRESQL: Final = pytest.param(
    "postgresql",
    marks=[
        pytest.mark.postgresql,
        pytest.mark.skipif(bool(POSTGRESQL_MISSING), reason=POSTGRESQL_MISSING or "it is there"),
    ],
)
"""For `pytest.fixture(params=...)`, together with `running_postgresql`."""


class Cluster:
    """A PostgreSQL that runs, with one database. In it every test has a schema of its own, which is made sooner than a database.

    Args:
        folder: That holds its socket.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._schemas = 0

    def create_schema(self) -> str:
        """A new one; returns the URL that leads there."""
        self._schemas += 1
        name = f"test{self._schemas}"
        self.execute(f"CREATE SCHEMA {name}")
        return f"postgresql://{SUPERUSER}@/postgres?host={self._folder}&options=-csearch_path%3D{name}"

    def execute(self, statement: str) -> None:
        """Have a statement carried out by the administrator."""
        import psycopg  # noqa: PLC0415 - where it is not installed, there is no cluster

        address = f"host={self._folder} user={SUPERUSER} dbname=postgres"
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(statement.encode())


@contextlib.contextmanager
def running_postgresql() -> Iterator[Cluster]:
    """Make a cluster, run it, and remove it."""
    with tempfile.TemporaryDirectory(prefix="whimbrel-") as name:
        folder = Path(name)
        user = _unprivileged()
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
        data = folder / "data"
        options = [f"-c {each}" for each in (*FAST, "listen_addresses=", f"unix_socket_directories={folder}")]
        # In a language whose dictionaries pass over hyphens, as most databases are.
        language = ("--encoding=UTF8", "--locale-provider=icu", "--icu-locale=en-u-ka-shifted")
        administrator = f"--username={SUPERUSER}"
        _run(user, "initdb", "--auth=trust", "--no-sync", *language, administrator, str(data))
        _run(
            user, "pg_ctl", "start", "-w", "-D", str(data), "-l", str(folder / "log"), "-o", " ".join(options)
        )
        pid = int((data / "postmaster.pid").read_text().split()[0])
        try:
            yield Cluster(folder)
        finally:
            os.kill(pid, signal.SIGQUIT)  # at once: there is nothing to be kept
            assert wait_until(lambda: not (data / "postmaster.pid").exists())


def _unprivileged() -> pwd.struct_passwd | None:
    """Another user than root; `None` where these tests run as one already."""
    if os.geteuid() != 0:
        return None
    names = {each.pw_name: each for each in pwd.getpwall()}
    return next(names[name] for name in USERS if name in names)


def _run(user: pwd.struct_passwd | None, program: str, *arguments: str) -> None:
    done = subprocess.run(
        [BINARIES / program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd="/",
        env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
        check=False,
        text=True,
        user=None if user is None else user.pw_uid,
        group=None if user is None else user.pw_gid,
        extra_groups=None if user is None else [],
    )
    assert done.returncode == 0, done.stderr
