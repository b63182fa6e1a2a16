"""Alembic's entry: migrations run on the connection, and in the transaction, that database.py opened."""

from alembic import context

from pipelines.ledger.database import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
