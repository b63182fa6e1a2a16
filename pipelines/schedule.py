"""``python -m pipelines schedule``: releases at set times, one at a time."""

import os

from pipelines import prefect_server
from pipelines.settings import Settings


def schedule(settings: Settings, cron: str, name: str) -> None:
    """Serve the release flow on a cron schedule, in the foreground, until stopped.

    A release that comes due while one is at work is cancelled, and the next one is on time. Stopping this process
    leaves the schedule active at the server, so that starting it again goes on (Prefect would pause it by default).
    """
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO")  # no one watches: the log is all there is
    prefect_server.prepare_environment(settings)
    with prefect_server.server(settings, with_services=True):
        from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy

        from pipelines.flows import release

        prefect_server.wait_until_ready(settings)
        release.serve(
            name=name,
            cron=cron,
            parameters={"project": str(settings.project.absolute())},
            pause_on_shutdown=False,
            global_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        )
