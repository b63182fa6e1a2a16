"""Changing params.yaml as a person would: one value, with comments and layout kept."""

import io
from collections.abc import Callable
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from digits.errors import DigitsError
from pipelines.disk import disk_errors, write_text_atomically
from pipelines.settings import Settings

PARAMS_FILE = "params.yaml"


class BadProfile(DigitsError):
    """There is no such profile in params.yaml."""

    code = "bad_profile"


def edited(settings: Settings, change: Callable[[Any], None]) -> str:
    """The text of the project's params.yaml after ``change`` has been made to its content; writes nothing.

    Raises:
        OSError: it cannot be read.
        ruamel.yaml.error.YAMLError: it is no YAML.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    params = yaml.load((settings.project / PARAMS_FILE).read_text(encoding="utf-8"))
    change(params)
    text = io.StringIO()
    yaml.dump(params, text)
    return text.getvalue()


def choose_profile(settings: Settings, name: str, tell: Callable[[str], None]) -> None:
    """Make ``name`` the profile of params.yaml, as `dvc exp run -S profile=NAME` does; nothing if it is already.

    Raises:
        BadProfile: params.yaml has none of that name, or cannot be read.
        DiskError: params.yaml cannot be written; it is as it was.
    """
    was: list[Any] = []

    def choose(params: Any) -> None:
        known = list(params.get("profiles") or {}) if isinstance(params, dict) else []
        if name not in known:
            raise BadProfile(f"profile is {name!r}; {PARAMS_FILE} has {', '.join(map(str, known)) or 'none'}")
        was.append(params.get("profile"))
        params["profile"] = name

    try:
        text = edited(settings, choose)
    except (OSError, YAMLError) as err:
        raise BadProfile(f"cannot choose a profile in {PARAMS_FILE}: {' '.join(str(err).split())}") from err
    if was == [name]:
        return
    with disk_errors("the profile", settings.project, f"{PARAMS_FILE} is as it was"):
        write_text_atomically(settings.project / PARAMS_FILE, text)
    tell(f"{PARAMS_FILE}: profile {was[0]} is now {name}")
