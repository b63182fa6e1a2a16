"""``python -m pipelines maintain``: the maintenance flow, with its own Prefect server if there is no other."""

from pipelines import prefect_server
from pipelines.exit_codes import Exit
from pipelines.flow_run import FlowRun
from pipelines.release import refuse_while_busy, stopped
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
        run = FlowRun(flow, str(settings.project), keep, watched=True)
        if run.state.is_cancelled():
            return stopped(run.state)
        done = run.result()
        if as_json:
            print_json(done.as_json())
        return Exit.DONE
