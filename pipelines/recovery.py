"""Complete what a killed command left half-done. All of it may be done again at any time, and changes nothing then.

A publish is decided by the rename of its folder, a promotion by the rename of models.config. What follows from them
(the rest of models.config, the champion's record, the ledger's rows) is written after, and here if that was cut off.
"""

from collections.abc import Callable

from pipelines import ledger, serving_config
from pipelines.champion import record_champion
from pipelines.prune import pruned_lineages, remove_pruned
from pipelines.settings import Settings
from pipelines.versions import read_lineage, version_numbers


def complete(settings: Settings, *, tell: Callable[[str], None] = lambda _text: None) -> list[str]:
    """Bring models.config, the champion's record and the ledger to what the published versions and the promotion say.

    Args:
        settings: where.
        tell: called with one line when the ledger is away, or has got what waited.

    Returns:
        What was missing and is there now, in words.
    """
    serving_config.ensure(settings)
    completed = ["the champion's record was missing or old: completed"] if record_champion(settings) else []
    if ledger.deliver(settings, _decisions_on_disk(settings), tell=tell):
        remove_pruned(settings)
    return completed


def _decisions_on_disk(settings: Settings) -> list[ledger.Decision]:
    """What the folders and models.config tell of: each published version, each removed one, the last promotion."""
    folders = [settings.versions_dir / str(number) for number in version_numbers(settings.versions_dir)]
    rows = [ledger.release(lineage) for folder in folders if (lineage := read_lineage(folder))]
    config = serving_config.read(settings)
    if config and config.decision:
        lineage = read_lineage(settings.versions_dir / str(config.promoted))
        rows.append(ledger.promotion(config.decision, lineage))
    rows += [ledger.prune(lineage, number) for number, lineage in pruned_lineages(settings)]
    return rows
