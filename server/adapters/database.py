"""A database as every part of the store uses it: transactions, errors, and records as JSON in rows.

SQLite by default, PostgreSQL by URL; whoever uses it need not know which. What the tables are is in `store.py` and `trail.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct
from sqlalchemy import (
    Connection,
    Engine,
    String,
    Table,
    and_,
    bindparam,
    create_engine,
    delete,
    event,
    insert,
    make_url,
)
from sqlalchemy.exc import ArgumentError, DBAPIError

from protocol.errors import RequestError, StorageError, StorageFullError
from server.display import address_text

LOCK_WAIT_S: Final = 30
"""How long a writer waits for another process; the longest transaction signs a few documents."""

CONNECT_WAIT_S: Final = 10
"""How long PostgreSQL may take to accept a connection."""

_WRITE_LOCK: Final = 0x7762_3101
"""On PostgreSQL whoever writes holds the advisory lock of this number: `wb1` and 1, in the hope that nobody else in that database does."""

_FULL: Final = ("disk is full", "No space left on device")
"""As SQLite and PostgreSQL say it."""

_Kind = TypeVar("_Kind", bound=Struct)
encode: Final = msgspec.json.Encoder().encode


class Database:
    """Safe to use from several threads and processes.

    Every write is one transaction that is durable on return and excludes every other one from its beginning; what is read in one
    transaction is of one moment.

    Args:
        url: `sqlite:///FILE` or `postgresql://USER@HOST/DATABASE`, with whatever else SQLAlchemy and libpq understand.

    Raises:
        RequestError: The URL names no usable database.
    """

    def __init__(self, url: str) -> None:
        try:
            self._engine, self._readers = _engines(url)
        except (ArgumentError, ValueError) as error:
            raise RequestError(
                f"database {address_text(url)!r}: {error}",
                hint="use sqlite:///FILE or postgresql://USER@HOST/DATABASE",
            ) from error
        except ImportError as error:
            raise RequestError(
                f"database {address_text(url)!r}: {error}", hint="install whimbrel[postgresql]"
            ) from error

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _load(self, kind: type[_Kind], query: Any) -> list[_Kind]:
        with self._reading() as connection:
            return [decoded(kind, body) for body in connection.execute(query).scalars()]

    def _scalar(self, query: Any) -> Any:
        with self._reading() as connection:
            return connection.execute(query).scalar()

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with _errors(self._engine), self._readers.connect() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with _errors(self._engine), self._engine.connect() as raw:
            connection = raw.execution_options(whimbrel_writes=True)
            with connection.begin():
                yield connection


def text(length: int) -> String:
    """The type of a column of names: ordered by their bytes, whatever language a database was made for."""
    return String(length).with_variant(String(length, collation="C"), "postgresql")


def _engines(address: str) -> tuple[Engine, Engine]:
    """For writers and for readers.

    Raises:
        ArgumentError: That is no URL.
        ValueError: It is one of another kind of database.
        ImportError: The driver is not installed.
    """
    url = make_url(address)
    match url.get_backend_name():
        case "sqlite":
            engine = create_engine(url, connect_args={"timeout": LOCK_WAIT_S})
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return engine, engine
        case "postgresql":
            # A connection that was cut while nobody used it is made anew before anybody notices.
            engine = create_engine(
                url.set(drivername="postgresql+psycopg"),
                connect_args={"connect_timeout": CONNECT_WAIT_S},
                pool_pre_ping=True,
            )
            event.listen(engine, "connect", _prepare_postgresql)
            event.listen(engine, "begin", _begin_postgresql)
            return engine, engine.execution_options(isolation_level="REPEATABLE READ")
        case other:
            raise ValueError(f"{other} is not supported")


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's BEGIN is ours to spell, see `_begin_sqlite`
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """A transaction that reads first and writes later would fail when another process wrote in between."""
    writes = connection.get_execution_options().get("whimbrel_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _prepare_postgresql(connection: Any, _: Any) -> None:
    connection.execute(f"SET lock_timeout = '{LOCK_WAIT_S}s'")
    connection.commit()  # else it would end with the first transaction that is taken back


def _begin_postgresql(connection: Connection) -> None:
    """One writer at a time, as with SQLite: nobody else changes what a writer has read."""
    if connection.get_execution_options().get("whimbrel_writes"):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITE_LOCK})")


def replace_rows(
    connection: Connection, table: Table, rows: dict[tuple[Any, ...], dict[str, Any] | None]
) -> None:
    """Delete and insert: the one upsert that every database spells alike."""
    keys = [column.name for column in table.primary_key.columns]
    old = delete(table).where(and_(*(table.c[name] == bindparam(f"key_{name}") for name in keys)))
    connection.execute(
        old, [{f"key_{name}": value for name, value in zip(keys, key, strict=True)} for key in rows]
    )
    new = [row for row in rows.values() if row is not None]
    if new:
        connection.execute(insert(table), new)


def decoded(kind: type[_Kind], body: bytes) -> _Kind:
    """A record as it was stored.

    Raises:
        StorageError: It is damaged.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise StorageError(
            f"database: a {kind.__name__} cannot be read: {error}", hint="restore it from a backup"
        ) from error


@contextmanager
def _errors(engine: Engine) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        reason = " ".join(str(error.orig).split())
        kind = StorageFullError if any(words in reason for words in _FULL) else StorageError
        raise kind(f"database {address_text(engine.url.render_as_string())}: {reason}") from error
