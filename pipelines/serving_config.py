"""Which version is served by default: the one file that says so, which TensorFlow Serving and our model server read.

``models.config`` is a text ``ModelServerConfig``. The label ``stable`` names the promoted version; the version policy
lists it and its predecessor, which stays loaded so that going back is instant. What else must outlive a crash is in a
comment in the same file, so that one rename changes everything at once: which versions were promoted before, which were
rolled back, and the decision itself, from which a missing row of the ledger is written later.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from digits import contract
from digits.errors import DigitsError
from pipelines.disk import disk_errors, write_text_atomically
from pipelines.locks import Busy, only_one
from pipelines.settings import Settings
from pipelines.versions import Version, read_version, version_numbers

LABEL: Final = "stable"
"""What clients ask for to get the promoted version."""

_STATE: Final = re.compile(r"^# state: (\{.*\})$", re.MULTILINE)
_HEAD: Final = (
    "# Which versions are served. Written by `python -m pipelines` (promote, rollback, release) and by nothing else:\n"
    "# what is changed by hand is lost with the next promotion.\n"
)


class ServingConfigError(DigitsError):
    """models.config cannot be read."""

    code = "serving_config"


@dataclass(frozen=True)
class ServingConfig:
    """What models.config says.

    Attributes:
        base_path: the folder of versions, as the model server sees it.
        versions: those to be loaded, ascending; empty: the newest one, whichever that is.
        promoted: what the label names; None before the first promotion.
        history: the versions promoted before and not left behind by a rollback, ascending; the last is ``promoted``.
        withdrawn: versions that a rollback left: never promoted again but by a person.
        decision: the last promotion or rollback, as the ledger's row.
    """

    base_path: str
    versions: tuple[int, ...] = ()
    promoted: int | None = None
    history: tuple[int, ...] = ()
    withdrawn: tuple[int, ...] = ()
    decision: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def predecessor(self) -> int | None:
        """What was promoted before ``promoted``, a lower version: what a rollback goes back to."""
        return self.history[-2] if len(self.history) > 1 else None


def read(settings: Settings) -> ServingConfig | None:
    """What models.config says; None when there is none yet.

    Raises:
        ServingConfigError: it cannot be read, or is no configuration of this model.
    """
    path = settings.serving_config_file
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as err:
        raise ServingConfigError(f"{path} cannot be read: {err}") from err
    return _parse(text, path)


def promoted(settings: Settings) -> int | None:
    """The version served by default; None as long as none was promoted.

    Raises:
        ServingConfigError: as for ``read``.
    """
    config = read(settings)
    return config.promoted if config else None


@contextlib.contextmanager
def only_writer(settings: Settings, wait_s: float) -> Iterator[None]:
    """Hold the right to change models.config while the block runs. Raises ``Busy`` when another holds it still."""
    folder = settings.versions_dir.parent
    with contextlib.ExitStack() as stack:
        with disk_errors("which version is served", folder, "what is served is as it was"):
            stack.enter_context(only_one(folder / ".promotion.lock", "promotion", wait_s))
        yield


def withdrawn_versions(settings: Settings) -> list[Version]:
    """The versions that a rollback left and that are still there, the highest first.

    Raises:
        ServingConfigError: as for ``read``.
    """
    config = read(settings)
    there = set(version_numbers(settings.versions_dir))
    numbers = sorted(there.intersection(config.withdrawn if config else ()), reverse=True)
    return [read_version(settings.versions_dir / str(number)) for number in numbers]


def ensure(settings: Settings) -> None:
    """Make models.config ready for a model server to start with, unless a promotion does so at this moment.

    Before the first promotion it says: the newest version. Published versions without a models.config, as from before
    there was one, are served as they were: the newest of them counts as promoted.

    Raises:
        DiskError: it cannot be written.
        ServingConfigError: what is there cannot be read.
    """
    with contextlib.suppress(Busy), only_writer(settings, wait_s=0.0):
        settle(settings)


def settle(settings: Settings) -> ServingConfig:
    """Write what a killed promotion left half-done, or what is new on the disk. For the only writer.

    Raises:
        DiskError, ServingConfigError: as for ``ensure``.
    """
    found = read(settings)
    config = found or _first(settings)
    config = settled(settings, replace(config, base_path=base_path(settings)))
    if config != found:
        write(settings, config)
    return config


def settled(settings: Settings, config: ServingConfig) -> ServingConfig:
    """The same with the versions that shall stay loaded: the promoted one and its predecessor, if it is still there."""
    if config.promoted is None:
        return replace(config, versions=())
    there = version_numbers(settings.versions_dir)
    history = tuple(number for number in config.history if number in there or number == config.promoted)
    return replace(config, history=history, versions=history[-2:])


def write(settings: Settings, config: ServingConfig) -> None:
    """Put the file in place of the old one, in one step.

    Raises:
        DiskError: it cannot be written; the old one stays.
    """
    path = settings.serving_config_file
    with disk_errors("which version is served", path.parent, "what is served is as it was"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, _text(config))


def base_path(settings: Settings) -> str:
    """The folder of versions, as the model server sees it."""
    if settings.served_models_dir is None:
        return str(settings.versions_dir)
    return os.fspath(settings.served_models_dir / contract.MODEL_NAME)


def _first(settings: Settings) -> ServingConfig:
    numbers = version_numbers(settings.versions_dir)
    if not numbers:
        return ServingConfig(base_path(settings))
    return ServingConfig(base_path(settings), promoted=numbers[-1], history=(numbers[-1],))


def _text(config: ServingConfig) -> str:
    from google.protobuf import text_format
    from tensorflow_serving.config import model_server_config_pb2

    message = model_server_config_pb2.ModelServerConfig()
    model = message.model_config_list.config.add(
        name=contract.MODEL_NAME, base_path=config.base_path, model_platform="tensorflow"
    )
    if config.versions:
        model.model_version_policy.specific.versions.extend(config.versions)
    else:
        model.model_version_policy.latest.num_versions = 1
    if config.promoted is not None:
        model.version_labels[LABEL] = config.promoted
    state = {"history": config.history, "withdrawn": config.withdrawn, "decision": config.decision}
    return f"{_HEAD}# state: {json.dumps(state, sort_keys=True)}\n{text_format.MessageToString(message)}"


def _parse(text: str, path: Path) -> ServingConfig:
    from google.protobuf import text_format
    from tensorflow_serving.config import model_server_config_pb2

    try:
        message = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
        (model,) = (m for m in message.model_config_list.config if m.name == contract.MODEL_NAME)
        found = _STATE.search(text)
        state = json.loads(found.group(1)) if found else {}
    except (text_format.ParseError, ValueError) as err:
        raise ServingConfigError(
            f"{path} is no configuration of the model {contract.MODEL_NAME} ({' '.join(str(err).split())}). Move it "
            "away; then `python -m pipelines promote N` writes a new one"
        ) from err
    label = model.version_labels.get(LABEL)
    return ServingConfig(
        base_path=model.base_path,
        versions=tuple(sorted(model.model_version_policy.specific.versions)),
        promoted=label,
        history=tuple(state.get("history") or ([label] if label is not None else [])),
        withdrawn=tuple(state.get("withdrawn") or ()),
        decision=state.get("decision"),
    )
