"""State hooks: what is told to the webhook when a flow ends."""

from pathlib import Path
from typing import Any, Final

from prefect.client.schemas.objects import FlowRun
from prefect.flows import Flow
from prefect.logging import get_logger
from prefect.states import State
from prefect.utilities.urls import url_for

from pipelines.notify import notify
from pipelines.publish import Published
from pipelines.settings import Settings

REJECTED: Final = "Rejected"
"""Name of the release's final state when the gate did not approve: an answer, not a failure."""

REFUSED: Final = "Refused"
"""Name of the final state of a flow that found another one at work."""


def tell_webhook(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:  # workers pass them by these names
    """The hook for every end of a flow. What changed nothing is not worth a message."""
    settings = settings_of(flow_run.parameters.get("project"))
    if settings.notify_url is None or (what := _what_happened(state)) is None:
        return
    event, text = what
    message = {
        "event": f"{flow.name}.{event}",
        "text": f"{flow.name} {flow_run.name}: {text}",
        "flow": flow.name,
        "run": flow_run.name,
        "run_id": str(flow_run.id),
        "state": state.name,
        "url": url_for(flow_run),
    }
    notify(settings, message, get_logger("notify").warning)


def settings_of(project: str | None) -> Settings:
    """The settings of a flow that was given this ``project``."""
    return Settings(project=Path(project)) if project else Settings()


def _what_happened(state: State) -> tuple[str, str] | None:
    """The event's name and a sentence about it; None when there is nothing to tell."""
    if state.name == REJECTED:
        return "rejected", f"the gate rejected the candidate: {state.message}; the served version stays"
    if state.is_failed():
        return "failed", state.message or "failed"
    if state.is_crashed():
        return "crashed", state.message or "ended by a signal"
    if state.is_cancelled() or state.is_cancelling():
        return "cancelled", state.message or "cancelled"
    if state.is_completed():
        result = state.result(raise_on_failure=False)
        if isinstance(result, Published) and result.new:
            return "published", f"version {result.version.number} is published"
    return None
