"""The table of decisions, to which rows can only be added."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_REFUSAL = "the ledger is append-only: rows are added, never changed or removed"


def upgrade() -> None:
    """Make the table and the triggers that guard it."""
    op.create_table(
        "decisions",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=False),
        sa.Column("id", sa.String(36), nullable=False, unique=True),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
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
    )
    op.create_index("decisions_by_version", "decisions", ["version"])
    if op.get_bind().dialect.name == "postgresql":
        _guard_postgresql()
    else:
        _guard_sqlite()


def downgrade() -> None:
    """Not offered: it would remove what must stay."""
    raise NotImplementedError("the ledger is never taken back; keep the database, or name another one")


def _guard_sqlite() -> None:
    for change in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER decisions_no_{change.lower()} BEFORE {change} ON decisions "
            f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
        )
    # INSERT OR REPLACE removes a row without the trigger above.
    op.execute(
        "CREATE TRIGGER decisions_no_replace BEFORE INSERT ON decisions "  # noqa: S608  # our own words
        "WHEN EXISTS (SELECT 1 FROM decisions WHERE seq = NEW.seq OR id = NEW.id) "
        f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
    )


def _guard_postgresql() -> None:
    op.execute(
        "CREATE FUNCTION decisions_refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{_REFUSAL}'; END $$"
    )
    op.execute(
        "CREATE TRIGGER decisions_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON decisions "
        "FOR EACH STATEMENT EXECUTE FUNCTION decisions_refuse_change()"
    )
