"""What the ledger and the published versions say, for people and for machines: ``history`` and ``show N``."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines import ledger, serving_config
from pipelines.dataset import digest_of
from pipelines.ledger import Decision, Entry, Kind
from pipelines.lineage import files_digest
from pipelines.settings import Settings
from pipelines.text import flat
from pipelines.versions import NoSuchVersion, read_lineage, version_numbers


@dataclass(frozen=True)
class Account:
    """All that is known of one version: whether it is served, its lineage, and the ledger's rows about it."""

    version: int
    state: str
    lineage: dict[str, Any]
    files_unchanged: bool | None
    """Whether its files are those that were published; None when they are no longer here."""
    entries: list[Entry]

    def as_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "version": self.version,
            "state": self.state,
            "files_unchanged": self.files_unchanged,
            "lineage": self.lineage,
            "ledger": [entry.as_json() for entry in self.entries],
        }


def account_of(settings: Settings, number: int, *, tell: Callable[[str], None]) -> Account:
    """From a version's number, as a served answer's ``model_version`` gives it, to all that is known of it.

    Works without the ledger's database while the version's folder is there, and without the folder when the ledger can
    be read.

    Raises:
        NoSuchVersion: neither knows it.
        LedgerError: the folder is gone and the ledger cannot be read.
    """
    folder = settings.versions_dir / str(number)
    here = number in version_numbers(settings.versions_dir)
    lineage = read_lineage(folder) if here else {}
    try:
        entries = ledger.read(settings, version=number)
    except ledger.LedgerError as err:
        if not here:
            raise
        tell(f"without the ledger's rows, for it is away ({err})")
        entries = []
    if not here:
        lineage = next((e.decision.details["lineage"] for e in entries if e.decision.kind is Kind.PRUNE), {})
    if not here and not any(entry.decision.version == number for entry in entries):
        there = ", ".join(map(str, version_numbers(settings.versions_dir))) or "none"
        raise NoSuchVersion(f"neither {settings.versions_dir} ({there}) nor the ledger knows a version {number}")
    files = lineage.get("files_sha256")
    unchanged = all(_same(folder / name, digest) for name, digest in files.items()) if here and files else None
    return Account(number, _state(settings, number, here), lineage, unchanged, entries)


def print_account(account: Account) -> None:
    """The version's facts, the gate's rows and the ledger's rows, as tables."""
    console = Console(highlight=False)
    facts = Table(title=f"version {account.version}: {account.state}", title_justify="left", show_header=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in _facts(account):
        if value is not None:
            facts.add_row(name, str(value))
    console.print(facts)
    checks = (account.lineage.get("decision") or {}).get("checks") or []
    if checks:
        console.print(_checks_table(checks))
    if account.entries:
        console.print(history_table(account.entries, title="decisions about it"))


def history_table(entries: Sequence[Entry], *, title: str) -> Table:
    """The ledger's rows, newest first. ``↶`` marks a time before that of the row before it: the clock was set back."""
    table = Table(title=title, title_justify="left")
    table.add_column("#", justify="right", no_wrap=True)
    for column in ("when (UTC)", "what", "accuracy"):
        table.add_column(column, no_wrap=True)
    table.add_column("who, why", overflow="fold")
    rows = []
    before = None
    for entry in entries:
        row = entry.decision
        when = f"{row.at:%Y-%m-%d %H:%M}{' ↶' if before is not None and row.at < before else ''}"
        before = row.at
        accuracy = row.metrics.get("accuracy")
        share = f"{accuracy:.2%}" if isinstance(accuracy, float) else ""
        rows.append((str(entry.seq), when, _what(row), share, f"{row.who}: {row.note}" if row.note else row.who))
    for cells in reversed(rows):
        table.add_row(*cells)
    return table


def print_history(settings: Settings, entries: Sequence[Entry], *, shortened: bool) -> None:
    """The rows, and what is served now."""
    console = Console(highlight=False)
    if not entries:
        console.print("the ledger has no rows yet; the first release writes one")
        return
    console.print(history_table(entries, title=f"ledger: {ledger.address(settings)}"))
    promoted = serving_config.promoted(settings)
    console.print("served: the newest version" if promoted is None else f"served: version {promoted}")
    if shortened:
        console.print(f"only the newest {len(entries)} are shown; more with --limit")


def _facts(account: Account) -> Iterator[tuple[str, Any]]:
    lineage = account.lineage
    git = lineage.get("git") or {}
    dirty = f", with changes in {', '.join(git.get('changed_files') or ['?'])}" if git.get("dirty") else ""
    files = lineage.get("files_sha256")
    unchanged = {True: ", as published", False: ", NOT as published: files were changed", None: ""}[
        account.files_unchanged
    ]
    yield "published", f"{lineage.get('published_at')} by {lineage.get('published_by') or 'unknown'}"
    yield "data (data.dvc)", lineage.get("data_md5")
    yield "commit", f"{git.get('commit')}{dirty}"
    yield "params.yaml (SHA-256)", lineage.get("params_sha256")
    yield "code (SHA-256)", lineage.get("code_sha256")
    yield "weights (SHA-256)", lineage.get("model_sha256")
    digest = lineage.get("saved_model_sha256") or (files_digest(files) if files else None)
    yield "SavedModel (SHA-256)", f"{digest}{unchanged}"
    yield "version before it", lineage.get("previous_version")
    yield "served when published", lineage.get("served_version")
    for name, value in flat(lineage.get("metrics") or {}):
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "schema":
            yield name, f"{value:.4f}" if isinstance(value, float) else value
    yield "packages", ", ".join(f"{name} {version}" for name, version in (lineage.get("packages") or {}).items())


def _checks_table(checks: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="the gate", title_justify="left")
    for column in ("", "check", "detail"):
        table.add_column(column, overflow="fold")
    for check in checks:
        mark = "[green]✓[/]" if check.get("passed") else "[red]✗[/]"
        table.add_row(mark, str(check.get("name")), str(check.get("detail") or ""))
    return table


def _state(settings: Settings, number: int, here: bool) -> str:
    if not here:
        return "removed"
    config = serving_config.read(settings)
    if config is None or config.promoted is None:
        newest = number == version_numbers(settings.versions_dir)[-1]
        return "served, as the newest" if newest else "published"
    if number == config.promoted:
        return "served"
    if number in config.withdrawn:
        return "rolled back"
    return "published, loaded beside the served one" if number in config.versions else "published"


def _same(path: Any, digest: str) -> bool:
    try:
        return digest_of(path) == digest
    except OSError:
        return False


def _what(row: Decision) -> str:
    colour = {Kind.REJECTION: "red", Kind.ROLLBACK: "yellow", Kind.PROMOTION: "green"}.get(row.kind)
    kind = f"[{colour}]{row.kind}[/]" if colour else str(row.kind)
    if row.kind in (Kind.PROMOTION, Kind.ROLLBACK) and row.previous_version is not None:
        return f"{kind} {row.previous_version} → {row.version}"
    return f"{kind} {row.version}" if row.version is not None else kind
