"""The candidate that the DVC stages left under ``artifacts/``, and what the gate said of it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from digits.errors import DigitsError
from pipelines import ledger
from pipelines.lineage import provenance
from pipelines.settings import Settings


class CandidateError(DigitsError):
    """There is no candidate, or its parts do not belong together."""

    code = "candidate"


class Rejected(DigitsError):
    """The gate did not approve this candidate."""

    code = "rejected"


@dataclass(frozen=True)
class Verdict:
    """The gate's word: decision.json, and the weights it is about (empty if it found none)."""

    approved: bool
    model_sha256: str
    decision: dict[str, Any]

    @property
    def reason(self) -> str:
        """Why, in the gate's words."""
        return str(self.decision.get("reason") or "no reason given")

    @property
    def checks(self) -> list[dict[str, Any]]:
        """The gate's rows: name, passed, value, limit, detail."""
        checks = self.decision.get("checks")
        return [check for check in checks if isinstance(check, dict)] if isinstance(checks, list) else []


@dataclass(frozen=True)
class Candidate:
    """An approved, exported candidate whose parts agree on the weights."""

    model_sha256: str
    saved_model: Path
    metrics: dict[str, Any]
    decision: dict[str, Any]


def read_verdict(settings: Settings) -> Verdict:
    """The gate's last word. Raises ``CandidateError`` when it has not spoken, or not clearly."""
    gate = settings.artifacts_dir / "gate"
    approval, decision = _read_json(gate / "approval.json"), _read_json(gate / "decision.json")
    approved, model_sha256 = approval.get("approved"), approval.get("model_sha256")
    if not isinstance(approved, bool) or (approved and not isinstance(model_sha256, str)):
        raise CandidateError(f"{gate / 'approval.json'} does not say whether what was approved; run: dvc repro -s gate")
    return Verdict(approved, model_sha256 or "", decision)


def read_candidate(settings: Settings) -> Candidate:
    """The approved candidate.

    Raises:
        Rejected: the gate rejected it.
        CandidateError: there is none, or metrics, approval and export speak of different weights.
    """
    verdict = read_verdict(settings)
    if not verdict.approved:
        raise Rejected(f"the gate rejected this candidate: {verdict.reason}; nothing is published")
    metrics = _read_json(settings.artifacts_dir / "evaluate" / "metrics.json")
    export = _read_json(settings.artifacts_dir / "export" / "export.json")
    for name, value in (("metrics.json", metrics), ("export.json", export)):
        if value.get("model_sha256") != verdict.model_sha256:
            raise CandidateError(
                f"the gate approved weights {verdict.model_sha256[:12]}…, {name} is about "
                f"{str(value.get('model_sha256'))[:12]}…; run: dvc repro"
            )
    saved_model = settings.artifacts_dir / "export" / "saved_model"
    if not (saved_model / "saved_model.pb").is_file():
        raise CandidateError(f"expected the exported model in {saved_model}; found none. Run: dvc repro")
    return Candidate(verdict.model_sha256, saved_model, metrics, verdict.decision)


def record_rejection(settings: Settings, verdict: Verdict, *, tell: Callable[[str], None] = lambda _text: None) -> None:
    """Put the gate's rejection into the ledger; once, however often the same verdict is met."""
    try:
        metrics = _read_json(settings.artifacts_dir / "evaluate" / "metrics.json")
    except CandidateError:
        metrics = {}
    sha256 = verdict.model_sha256 or None
    row = ledger.rejection(verdict.decision, provenance(settings), model_sha256=sha256, metrics=metrics)
    ledger.record(settings, row, tell=tell)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise CandidateError(f"expected {path}; it is not there. Run: dvc repro") from err
    except (OSError, ValueError) as err:
        raise CandidateError(f"{path} cannot be read ({err}). Run: dvc repro") from err
    if not isinstance(content, dict):
        raise CandidateError(f"{path} holds no record. Run: dvc repro")
    return content
