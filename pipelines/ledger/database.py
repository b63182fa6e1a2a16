"""The ledger's table: SQLite in ``run/``, or PostgreSQL by ``DIGITS_LEDGER_URL``. Rows are added, never changed.

The database itself refuses to change or remove a row (triggers, made by the migrations). Rows are in the order in which
they arrived, by ``seq``, which has no gaps: a clock that was set back changes the times shown, not the order.
"""

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from digits.errors import DigitsError
from pipelines.ledger.decision import Decision, Entry, Kind
from pipelines.settings import Settings

SCHEMA: Final = "0001"
"""The newest migration. A database that is behind is brought here at its first use."""

_MIGRATIONS: Final = Path(__file__).with_name("migrations")
_MIGRATING: Final = 6_114_218_853
"""Key of PostgreSQL's advisory lock: one migrates, the others wait."""


class LedgerError(DigitsError):
    """The ledger cannot be used as it is set up."""

    code = "ledger"


class LedgerAway(LedgerError):
    """The database cannot be reached now. Nothing is lost: decisions wait in the spool."""

    code = "ledger_away"


class _Utc(sa.types.TypeDecorator[datetime.datetime]):
    """A time in UTC; SQLite keeps none of the zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime.datetime | None, _dialect: sa.Dialect) -> datetime.datetime | None:
        return None if value is None else value.astimezone(datetime.UTC)

    def process_result_value(self, value: Any, _dialect: sa.Dialect) -> datetime.datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=datetime.UTC) if value.tzinfo is None else value.astimezone(datetime.UTC)


metadata = sa.MetaData()

decisions = sa.Table(
    "decisions",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=False),
    sa.Column("id", sa.String(36), nullable=False, unique=True),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("at", _Utc(), nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("version", sa.BigInteger),
    sa.Column("previous_version", sa.BigInteger),
    sa.Column("model_sha256", sa.String(64)),
    sa.Column("saved_model_sha256", sa.String(64)),
    sa.Column("data_md5", sa.String(64)),
    sa.Column("params_sha256", sa.String(64)),
    sa.Column("code_sha256", sa.String(64)),
    sa.Column("git_commit", sa.String(64)),
    sa.Column("git_dirty", sa.Boolean),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.Column("checks", sa.JSON, nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("details", sa.JSON, nullable=False),
    sa.Index("decisions_by_version", "version"),
)
"""The columns are the fields of ``Decision``, and ``seq``."""


def append(settings: Settings, rows: Sequence[Decision]) -> int:
    """Add those of the decisions that are not there yet, in the order given, all or none.

    Returns:
        How many were added.

    Raises:
        LedgerAway: the database cannot be reached, or does not answer.
        LedgerError: DIGITS_LEDGER_URL cannot be used, or the table is of a newer version of this code.
    """
    with _transaction(settings, write=True) as connection:
        ids = [row.id for row in rows]
        known = set(connection.scalars(sa.select(decisions.c.id).where(decisions.c.id.in_(ids))))
        missing = [row for row in {row.id: row for row in rows}.values() if row.id not in known]
        last = connection.scalar(sa.select(sa.func.max(decisions.c.seq))) or 0
        for seq, row in enumerate(missing, start=last + 1):
            connection.execute(decisions.insert().values(seq=seq, **row.as_json() | {"at": row.at}))
        return len(missing)


def read(
    settings: Settings, *, version: int | None = None, kinds: Sequence[Kind] = (), limit: int | None = None
) -> list[Entry]:
    """The ledger's rows, oldest first.

    Args:
        settings: where.
        version: only rows about this version, or that went away from it.
        kinds: only these kinds; all when empty.
        limit: only the newest so many.

    Raises:
        LedgerError: as for ``append``.
    """
    query = sa.select(decisions).order_by(decisions.c.seq.desc()).limit(limit)
    if version is not None:
        query = query.where(sa.or_(decisions.c.version == version, decisions.c.previous_version == version))
    if kinds:
        query = query.where(decisions.c.kind.in_([str(kind) for kind in kinds]))
    with _transaction(settings, write=False) as connection:
        rows = connection.execute(query).mappings().all()
    return [Entry(row["seq"], _decision(row)) for row in reversed(rows)]


def address(settings: Settings) -> str:
    """Where the ledger is, without a password."""
    return _url(settings).render_as_string(hide_password=True)


def _decision(row: Any) -> Decision:
    return Decision(**{name: value for name, value in row.items() if name != "seq"} | {"kind": Kind(row["kind"])})


@contextlib.contextmanager
def _transaction(settings: Settings, *, write: bool) -> Iterator[sa.Connection]:
    """One transaction on an up-to-date table; when it writes, alone."""
    url = _url(settings)
    if url.get_backend_name() == "sqlite" and url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = _engine(url)
    try:
        _migrate(engine)
        with engine.connect().execution_options(write=write) as connection, connection.begin():
            if write and engine.dialect.name == "postgresql":
                connection.execute(sa.text("LOCK TABLE decisions IN SHARE ROW EXCLUSIVE MODE"))
            yield connection
    except DBAPIError as err:
        raise LedgerAway(f"{address(settings)}: {_first_line(err.orig)}") from err
    except OSError as err:
        raise LedgerAway(f"{address(settings)}: {err}") from err
    finally:
        engine.dispose()


def _url(settings: Settings) -> URL:
    """The database's address, with the drivers that are installed."""
    if settings.ledger_url is None:
        return URL.create("sqlite", database=str((settings.run_dir / "ledger.sqlite").absolute()))
    try:
        url = make_url(settings.ledger_url.get_secret_value())
    except ArgumentError as err:
        raise LedgerError(
            "expected an address such as postgresql://user@host/database in DIGITS_LEDGER_URL; what is there is none"
        ) from err
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise LedgerError(f"expected sqlite or postgresql in DIGITS_LEDGER_URL; came {url.get_backend_name()}")
    return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgresql", "postgres") else url


def _engine(url: URL) -> sa.Engine:
    sqlite = url.get_backend_name() == "sqlite"
    # A database that hangs must not hang a release: every wait has an end.
    limits = "-c statement_timeout=10s -c lock_timeout=5s -c idle_in_transaction_session_timeout=30s"
    waits: dict[str, Any] = {"timeout": 5} if sqlite else {"connect_timeout": 5, "options": limits}
    try:
        engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args=waits)
    except (NoSuchModuleError, ImportError) as err:
        raise LedgerError(f"the driver in DIGITS_LEDGER_URL is not installed ({err}); use postgresql://…") from err
    if sqlite:
        event.listen(engine, "connect", _leave_transactions_to_us)
        event.listen(engine, "begin", _begin)
    return engine


def _leave_transactions_to_us(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA synchronous = FULL")


def _begin(connection: sa.Connection) -> None:
    immediate = connection.get_execution_options().get("write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _migrate(engine: sa.Engine) -> None:
    """Bring the table up to date."""
    if _schema(engine) == SCHEMA:
        return
    from alembic import command  # only the first time and after an update
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with engine.connect().execution_options(write=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATING})
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as err:
            raise LedgerError(
                f"the ledger's table is of a newer version of this code ({err}): update the code, or name another "
                "database in DIGITS_LEDGER_URL"
            ) from err


def _schema(engine: sa.Engine) -> str | None:
    """The migration that the database is at; None for a new one."""
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        return connection.scalar(sa.text("SELECT version_num FROM alembic_version"))


def _first_line(err: BaseException | None) -> str:
    lines = str(err).strip().splitlines()
    return lines[0] if lines else type(err).__name__
