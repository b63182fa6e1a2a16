"""One row of the ledger: what was decided, about what, by whom; and how each kind is made from what lies on the disk.

A decision's id is made once, with the decision: from the lineage for a release, from the gate's words for a rejection.
So whoever writes it, and however often, the ledger has it once.
"""

import datetime
import getpass
import json
import math
import os
import socket
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Final, Self

from pipelines.lineage import code_digest, files_digest

_IDS: Final = uuid.UUID("6f1d2f0c-6d3b-5e57-9f0e-0f8a3c1f6b52")
"""The namespace of our name-based ids (RFC 9562, version 5)."""


class Kind(StrEnum):
    """What was decided."""

    RELEASE = "release"
    """The gate approved, and a version was published."""
    REJECTION = "rejection"
    """The gate did not approve; nothing was published."""
    PROMOTION = "promotion"
    """A version became what is served by default."""
    ROLLBACK = "rollback"
    """A lower version became what is served by default, in place of a higher one."""
    PRUNE = "prune"
    """A version's folder was removed."""
    REPRODUCTION = "reproduction"
    """A version was built again from its lineage and compared."""


@dataclass(frozen=True)
class Decision:
    """One decision. Hashes and version numbers are None where there are none; ``at`` is the writer's clock, UTC."""

    kind: Kind
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    at: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    who: str = field(default_factory=lambda: author())
    version: int | None = None
    previous_version: int | None = None
    model_sha256: str | None = None
    """The candidate's weights."""
    saved_model_sha256: str | None = None
    """One digest over the SavedModel's files."""
    data_md5: str | None = None
    """What data.dvc recorded."""
    params_sha256: str | None = None
    code_sha256: str | None = None
    """One digest over the modules that the DVC stages depend on."""
    git_commit: str | None = None
    git_dirty: bool | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    """The gate's rows."""
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    """What is peculiar to the kind, such as how a reproduction differs."""

    def as_json(self) -> dict[str, Any]:
        """As JSON can hold it; not-a-numbers become words."""
        return {**_finite(asdict(self)), "kind": str(self.kind), "at": self.at.isoformat()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What ``as_json`` made; what this code does not know of is left out.

        Raises:
            ValueError: it is no decision.
        """
        known = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        try:
            known["kind"] = Kind(known["kind"])
            known["at"] = datetime.datetime.fromisoformat(known["at"])
            return cls(**known)
        except (KeyError, TypeError) as err:
            raise ValueError(f"no decision of the ledger: {err!r}") from err


@dataclass(frozen=True)
class Entry:
    """A decision as the ledger has it: its place in the order, which no clock can change, and the decision."""

    seq: int
    decision: Decision

    def as_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"seq": self.seq, **self.decision.as_json()}


def release(lineage: Mapping[str, Any]) -> Decision:
    """That this version was published, from its lineage."""
    name = f"release/{lineage.get('version')}/{lineage.get('model_sha256')}/{lineage.get('published_at')}"
    return Decision(
        Kind.RELEASE,
        id=_id(name),
        at=_time(lineage.get("published_at")),
        who=str(lineage.get("published_by") or "unknown"),
        version=lineage.get("version"),
        previous_version=lineage.get("previous_version"),
        **about(lineage),
    )


def rejection(
    decision: Mapping[str, Any], provenance: Mapping[str, Any], *, model_sha256: str | None, metrics: Mapping[str, Any]
) -> Decision:
    """That the gate rejected this candidate. The same words about the same weights are the same decision.

    Args:
        decision: the content of decision.json.
        provenance: as ``lineage.provenance`` gives it.
        model_sha256: the candidate's weights; None when the gate found none.
        metrics: the content of metrics.json.
    """
    champion = decision.get("champion")
    facts = {**provenance, "model_sha256": model_sha256, "metrics": metrics, "decision": decision}
    return Decision(
        Kind.REJECTION,
        id=_id("rejection/" + json.dumps(_finite(facts), sort_keys=True, default=str)),
        previous_version=champion.get("version") if isinstance(champion, Mapping) else None,
        note=str(decision.get("reason") or ""),
        **about(facts),
    )


def promotion(decision: Mapping[str, Any], lineage: Mapping[str, Any]) -> Decision:
    """That a version became what is served by default: the decision as models.config has it, and what it is about."""
    return Decision.from_json({**about(lineage), **decision})


def prune(lineage: Mapping[str, Any], number: int, *, who: str | None = None) -> Decision:
    """That this version's folder was removed. Its lineage stays here."""
    return Decision(
        Kind.PRUNE,
        id=_id(f"prune/{number}/{lineage.get('model_sha256')}/{lineage.get('published_at')}"),
        who=who or author(),
        version=number,
        details={"lineage": _finite(dict(lineage))},
        **about(lineage),
    )


def about(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """A decision's fields that say what it is about, from a lineage; also from one written before it had them all."""
    git = lineage.get("git") or {}
    files = lineage.get("files_sha256")
    stages = lineage.get("stages") or {}
    verdict = lineage.get("decision") or {}
    checks = verdict.get("checks")
    return {
        "model_sha256": lineage.get("model_sha256"),
        "saved_model_sha256": lineage.get("saved_model_sha256") or (files_digest(files) if files else None),
        "data_md5": lineage.get("data_md5"),
        "params_sha256": lineage.get("params_sha256"),
        "code_sha256": lineage.get("code_sha256") or (code_digest(stages) if stages else None),
        "git_commit": git.get("commit"),
        "git_dirty": git.get("dirty"),
        "metrics": _finite(dict(lineage.get("metrics") or {})),
        "checks": _finite([check for check in checks if isinstance(check, dict)] if isinstance(checks, list) else []),
    }


def author() -> str:
    """Who decides: ``user@host``, and the flow run where it is one."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for the user
        user = str(os.getuid())
    who = f"{user}@{socket.gethostname()}"
    runtime = sys.modules.get("prefect.runtime")  # without it there is no flow, and its import takes seconds
    run = runtime.flow_run.name if runtime else None
    return f"{who}, flow run {run}" if run else who


def _id(name: str) -> str:
    return str(uuid.uuid5(_IDS, name))


def _time(text: Any) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(str(text)).astimezone(datetime.UTC)
    except ValueError:
        return datetime.datetime.now(datetime.UTC)


def _finite(value: Any) -> Any:
    """The same with not-a-numbers and infinities as words, which JSON has no other way for."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
