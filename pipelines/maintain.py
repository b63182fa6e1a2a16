"""``python -m pipelines maintain``: the maintenance flow, with its own Prefect server if there is no other."""

from pipelines import prefect_server
from pipelines.exit_codes import Exit
from pipelines.release import refuse_while_busy, result_of, stopped
from pipelines.settings import Settings
from pipelines.text import print_json


def maintain(settings: Settings, keep: int, *, as_json: bool = False) -> Exit:
    """Run the flow; it says step by step what it does. Returns the exit code.

    Raises:
        Busy: a release is at work.
        DigitsError: what stopped the flow.
    """
    refuse_while_busy(settings, "release or maintenance")
    prefect_server.prepare_environment(settings)
    with prefect_server.server(settings):
        from pipelines.flows.maintenance import maintenance as flow  # takes seconds, meanwhile the server starts

        prefect_server.wait_until_ready(settings)
        state = flow(str(settings.project), keep, watched=True, return_state=True)
        if state.is_cancelled():
            return stopped(state)
        done = result_of(state)
        if as_json:
            print_json(done.as_json())
        return Exit.DONE
