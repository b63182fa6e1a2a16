"""The release ledger: every decision about the model, in a table to which rows can only be added.

``record`` puts one in, whether or not the database can be reached; ``read`` gives them back.
"""

from pipelines.ledger.database import LedgerAway, LedgerError, address, read
from pipelines.ledger.decision import Decision, Entry, Kind, about, author, promotion, prune, rejection, release
from pipelines.ledger.spool import deliver, record, waiting

__all__ = [
    "Decision",
    "Entry",
    "Kind",
    "LedgerAway",
    "LedgerError",
    "about",
    "address",
    "author",
    "deliver",
    "promotion",
    "prune",
    "read",
    "record",
    "rejection",
    "release",
    "waiting",
]
