"""Where a flow's tasks run: threads of this process, or a Dask cluster. A setting, the same flow."""

from typing import Any, Final

from prefect.task_runners import ThreadPoolTaskRunner

from pipelines.settings import Settings

THREADS: Final = "threads"
DASK: Final = "dask"


def task_runner(settings: Settings) -> Any:
    """The task runner that ``DIGITS_TASK_RUNNER`` names; Dask's is imported only when it is that."""
    if settings.task_runner == THREADS:
        return ThreadPoolTaskRunner(max_workers=settings.task_workers)
    from prefect_dask.task_runners import DaskTaskRunner

    if settings.dask_address:
        return DaskTaskRunner(address=settings.dask_address)
    cluster = {"n_workers": settings.task_workers, "threads_per_worker": 1, "dashboard_address": None}
    return DaskTaskRunner(cluster_class="distributed.LocalCluster", cluster_kwargs=cluster)


class TaskRunnerOfSettings(ThreadPoolTaskRunner):
    """Stands on a flow; when a run begins, the settings of that moment say what takes its place."""

    def duplicate(self) -> Any:
        """What Prefect asks for at the start of each run."""
        return task_runner(Settings())
