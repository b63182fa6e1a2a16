"""The champion: the version that is served by default, in the record that the gate compares a candidate with."""

import json
from pathlib import Path
from typing import Any, Final

from pipelines import serving_config
from pipelines.disk import disk_errors, write_json_atomically
from pipelines.locks import only_one
from pipelines.settings import Settings
from pipelines.versions import Version, newest_version, read_version

_WAIT_S: Final = 10.0


def served_version(settings: Settings) -> Version | None:
    """What is served by default: the promoted version; the newest one as long as none was ever promoted."""
    promoted = serving_config.promoted(settings)
    if promoted is not None:
        return read_version(settings.versions_dir / str(promoted))
    return newest_version(settings.versions_dir)


def record_champion(settings: Settings) -> bool:
    """Write the champion's record if it names another version than the served one, as after a crash before it.

    Returns:
        Whether it had to be written.
    """
    served = served_version(settings)
    if served is None or not served.lineage:
        return False
    metrics = served.lineage.get("metrics") or {}
    record = {
        "schema": 1,
        "version": served.number,
        "model_sha256": served.model_sha256,
        "path": _path_in_project(settings, served.folder),
        "metrics": served.lineage.get("metrics"),
        "test_sha256": metrics.get("test_sha256"),
        "published_at": served.lineage.get("published_at"),
    }
    what, aftermath = "the champion's record", "what is served is not touched by that"
    with (
        disk_errors(what, settings.champion_file.parent, aftermath),
        only_one(settings.run_dir / "champion.lock", "writer of the champion's record", _WAIT_S),
    ):
        if champion_record(settings) == record:
            return False
        write_json_atomically(settings.champion_file, record)
        return True


def champion_record(settings: Settings) -> dict[str, Any] | None:
    """The champion's record; None when there is none that can be read."""
    try:
        record = json.loads(settings.champion_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _path_in_project(settings: Settings, folder: Path) -> str:
    """Relative to the project where it lies inside, so that the record survives a move of the whole folder."""
    project = settings.project.absolute()
    return str(folder.relative_to(project)) if folder.is_relative_to(project) else str(folder)
