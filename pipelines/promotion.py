"""Decide which version is served by default: promote a version, or roll back to a lower one.

Labels attach to loaded versions only, and a version is loaded because the policy lists it. So models.config is written
in turns: first with the new version beside the served one and the label where it was; once the model server has it,
with the label moved; last without what need not stay loaded. A version that is loaded is served after one write.
Killed anywhere, either the old or the new version is the promoted one, and the next command completes the rest.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from digits.errors import DigitsError
from pipelines import ledger, model_server, serving_config
from pipelines.champion import record_champion
from pipelines.serving_config import LABEL, ServingConfig
from pipelines.settings import Settings
from pipelines.versions import find_version

_LABEL_WAIT_S: Final = 10.0
"""For the model server to read models.config again; it looks every second."""

Check = Callable[[bool], None]


class PromotionError(DigitsError):
    """The version is not served; what was served is."""

    code = "promotion"


@dataclass(frozen=True)
class Promotion:
    """The outcome.

    Attributes:
        version: what is served by default now.
        previous: what was before; None when nothing was promoted yet.
        kind: promotion or rollback.
        new: whether this call changed it.
        confirmed: whether the model server answers with it; None when no model server could be asked.
        duration_s: from the call to that confirmation, or to the write that decided.
    """

    version: int
    previous: int | None
    kind: ledger.Kind
    new: bool
    confirmed: bool | None
    duration_s: float


def promote(
    settings: Settings,
    number: int,
    *,
    note: str = "",
    tell: Callable[[str], None] = lambda _text: None,
    check: Check = lambda _loaded: None,
) -> Promotion:
    """Serve a published version by default. Nothing happens when it is served already.

    Args:
        settings: where.
        number: the version; not lower than the one served now.
        note: why, for the ledger.
        tell: called with what a person should know, line by line.
        check: called before the version is served, with whether the model server has it loaded. What it raises ends the
            promotion, and all is as it was.

    Raises:
        NoSuchVersion: it is not published.
        PromotionError: it is lower than the served one, or the model server cannot load it.
        DiskError: models.config cannot be written.
        Busy: another promotion is at work.
    """
    return _serve(settings, number, ledger.Kind.PROMOTION, note, tell, check)


def rollback(
    settings: Settings, number: int | None = None, *, note: str = "", tell: Callable[[str], None] = lambda _text: None
) -> Promotion:
    """Serve a lower published version by default; versions above it are promoted again only by hand.

    Args:
        settings: where.
        number: the version; None for the one promoted before the one served now.
        note: why, for the ledger.
        tell: called with what a person should know, line by line.

    Raises:
        NoSuchVersion, PromotionError, DiskError, Busy: as for ``promote``.
    """
    return _serve(settings, number, ledger.Kind.ROLLBACK, note, tell)


def is_withdrawn(settings: Settings, number: int) -> bool:
    """Whether a rollback left this version behind: then only a person promotes it again."""
    config = serving_config.read(settings)
    return config is not None and number in config.withdrawn


def _serve(
    settings: Settings,
    wanted: int | None,
    kind: ledger.Kind,
    note: str,
    tell: Callable[[str], None],
    check: Check = lambda _loaded: None,
) -> Promotion:
    started = time.monotonic()
    with serving_config.only_writer(settings, settings.lock_timeout_s):
        before = serving_config.settle(settings)
        number = before.predecessor if wanted is None else wanted
        if number is None:
            raise PromotionError("no version was promoted before the served one. Name one: rollback --to N")
        version = find_version(settings.versions_dir, number)
        if before.promoted == number:
            record_champion(settings)
            return Promotion(number, before.predecessor, kind, False, None, time.monotonic() - started)
        _require_direction(before.promoted, number, kind)
        loaded = _load(settings, before, number, tell)
        try:
            check(loaded)
        except BaseException:
            serving_config.write(settings, before)
            raise
        after = _decided(before, number, kind, note)
        if loaded:  # what was served stays loaded until the label has moved
            serving_config.write(settings, replace(after, versions=_both(before, number)))
        else:
            serving_config.write(settings, serving_config.settled(settings, after))
        confirmed = _confirmed(settings, number, tell) if loaded else None
        duration_s = time.monotonic() - started
        serving_config.settle(settings)
        record_champion(settings)
    ledger.record(settings, ledger.promotion(after.decision or {}, version.lineage), tell=tell)
    return Promotion(number, before.promoted, kind, True, confirmed, duration_s)


def _require_direction(served: int | None, number: int, kind: ledger.Kind) -> None:
    """A promotion goes up and a rollback down, so that the ledger's word for it is true."""
    if served is None:
        if kind is ledger.Kind.ROLLBACK:
            raise PromotionError(f"nothing was promoted yet, so there is nothing to roll back. Run: promote {number}")
    elif number < served and kind is ledger.Kind.PROMOTION:
        raise PromotionError(f"version {served} is served, and {number} is lower. To go back: rollback --to {number}")
    elif number > served and kind is ledger.Kind.ROLLBACK:
        raise PromotionError(f"version {served} is served, and {number} is higher. To go there: promote {number}")


def _load(settings: Settings, before: ServingConfig, number: int, tell: Callable[[str], None]) -> bool:
    """Have the model server load the version, the served one beside it. False when there is no model server to ask."""
    states = model_server.version_states(settings)
    if states is None:
        tell("no model server answers: it will serve this version when it starts, or next reads models.config")
        return False
    if states.get(number, ("", ""))[0] == model_server.AVAILABLE:
        return True
    tell(f"the model server loads version {number}")
    try:
        serving_config.write(settings, replace(before, versions=_both(before, number)))
        model_server.wait_until_available(settings, number)
    except BaseException as err:
        serving_config.write(settings, before)
        if isinstance(err, model_server.NotLoaded):
            served = "what was served before" if before.promoted is None else f"version {before.promoted}"
            raise PromotionError(f"{err}; {served} stays") from err
        raise
    return True


def _decided(before: ServingConfig, number: int, kind: ledger.Kind, note: str) -> ServingConfig:
    """The configuration with the decision in it: from its writing on, it has been made."""
    left = [version for version in before.history if version > number]
    row = ledger.Decision(kind, version=number, previous_version=before.promoted, note=note).as_json()
    return replace(
        before,
        promoted=number,
        history=(*(version for version in before.history if version < number), number),
        withdrawn=tuple(sorted({*before.withdrawn, *left} - {number})),
        decision={name: row[name] for name in ("id", "kind", "at", "who", "version", "previous_version", "note")},
    )


def _both(before: ServingConfig, number: int) -> tuple[int, ...]:
    return (number,) if before.promoted is None else tuple(sorted((before.promoted, number)))


def _confirmed(settings: Settings, number: int, tell: Callable[[str], None]) -> bool:
    """Whether the model server answers with this version for the label."""
    if model_server.wait_until_labelled(settings, LABEL, number, _LABEL_WAIT_S):
        return True
    tell(
        f"the model server has version {number}, but its label {LABEL!r} does not name it after {_LABEL_WAIT_S:.0f} s. "
        f"Was it started with --model_config_file={settings.serving_config_file} and its poll_wait_seconds flag?"
    )
    return False
