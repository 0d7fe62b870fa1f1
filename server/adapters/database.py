"""A database as every part of the store uses it: transactions, errors, and records as JSON in rows.

SQLite by default, PostgreSQL by URL. What the tables are is in `store.py` and `trail.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct
from sqlalchemy import Connection, Engine, Table, and_, bindparam, create_engine, delete, event, insert
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from protocol.errors import RequestError, StorageError, StorageFullError
from server.display import address_text

LOCK_WAIT_S: Final = 30
"""How long a writer waits for another process; the longest transaction signs a few documents."""

_Kind = TypeVar("_Kind", bound=Struct)
encode: Final = msgspec.json.Encoder().encode


class Database:
    """Safe to use from several threads and processes. Every write is one transaction that is durable on return.

    Args:
        url: SQLAlchemy URL.

    Raises:
        RequestError: The URL names no usable database.
        StorageError: The database cannot be opened.
    """

    def __init__(self, url: str) -> None:
        try:
            arguments = {"timeout": LOCK_WAIT_S} if url.startswith("sqlite") else {}
            self._engine: Engine = create_engine(url, connect_args=arguments)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise RequestError(
                f"database {address_text(url)!r}: {error}",
                hint="use sqlite:///FILE or a URL with an installed driver",
            ) from error
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _prepare_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)

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
        with _errors(self._engine), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with _errors(self._engine), self._engine.connect() as raw:
            connection = raw.execution_options(whimbrel_writes=True)
            with connection.begin():
                yield connection


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
        reason = str(error.orig)
        kind = StorageFullError if "disk is full" in reason else StorageError
        raise kind(f"database {engine.url.render_as_string()}: {reason}") from error
