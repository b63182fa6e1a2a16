"""``python -m pipelines schedule``: releases at set times, one at a time."""

import asyncio
import os
import signal
from typing import Any

from rich.console import Console

from digits.errors import DigitsError
from pipelines import prefect_server
from pipelines.settings import Settings


class BadSchedule(DigitsError):
    """The schedule is not one that cron knows."""

    code = "bad_schedule"


def schedule(settings: Settings, cron: str, name: str, profile: str | None) -> None:
    """Serve the release flow on a cron schedule, in the foreground, until stopped.

    A release that comes due while one is at work is cancelled, and the next one is on time. Stopping this process
    leaves the schedule active at the server, so that starting it again goes on (Prefect would pause it by default).

    Args:
        settings: where.
        cron: five fields, such as ``0 3 * * *``, in UTC.
        name: name of the Prefect deployment.
        profile: of params.yaml, chosen by each release; what stands there when None.

    Raises:
        BadSchedule: cron does not know such a time.
        PrefectUnavailable: the server does not start or answer.
    """
    # A script's "&" starts its commands with SIGINT ignored; stopping a runner is made of SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO")  # no one watches: the log is all there is
    prefect_server.prepare_environment(settings)
    with prefect_server.server(settings, with_services=True):
        from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
        from prefect.client.schemas.schedules import CronSchedule
        from prefect.runner import Runner

        from pipelines.flows.release import release

        try:
            when = CronSchedule(cron=cron, timezone="UTC")
        except ValueError as err:
            raise BadSchedule(f"expected cron's five fields, such as '0 3 * * *'; came {cron!r}") from err

        class StoppableRunner(Runner):
            def handle_sigterm(self, *_: Any, **__: Any) -> None:
                # Prefect's own forgets to wait for its runs' end. Ctrl-C's way does it right.
                signal.raise_signal(signal.SIGINT)

        prefect_server.wait_until_ready(settings)
        runner = StoppableRunner(name=name, pause_on_shutdown=False)
        runner.add_flow(
            release,
            name=name,
            schedule=when,
            parameters={"project": str(settings.project.absolute()), "profile": profile},
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        )
        console = Console(highlight=False)
        console.print(
            f"releases at '{cron}' (UTC); Prefect's UI: {prefect_server.ui_url()}; stop: Ctrl-C", soft_wrap=True
        )
        try:
            asyncio.run(runner.start())
        except KeyboardInterrupt:
            console.print("stopped; the schedule stays active at the server")
