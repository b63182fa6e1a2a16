"""The life of versions, on real folders, with a loader that reads a text file in place of a graph."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from serving.model_server.config import All, Latest, ModelConfig, Specific
from serving.model_server.errors import Code, ServingError
from serving.model_server.manager import Manager, State


class TextModel:
    """Holds the text of its graph file; remembers that it was closed."""

    def __init__(self, path: Path) -> None:
        self.text = (path / "saved_model.pb").read_text()
        self.closed = False
        if self.text == "bad":
            raise ServingError(Code.DATA_LOSS, "the graph is damaged")

    def close(self) -> None:
        self.closed = True


def put(base_path: Path, version: int, text: str = "good") -> Path:
    staging = base_path / "staging"
    staging.mkdir(parents=True)
    (staging / "saved_model.pb").write_text(text)
    return staging.rename(base_path / str(version))


def until(claim: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not claim():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


@pytest.fixture
def manage(tmp_path):
    """``manage(config, …)`` starts a manager that looks every 10 ms."""
    managers: list[Manager[TextModel]] = []

    def manage(*configs: ModelConfig, **settings) -> Manager[TextModel]:
        manager = Manager(lambda _name, _number, path: TextModel(path), poll_s=0.01, **settings)
        managers.append(manager)
        manager.start(configs)
        return manager

    yield manage
    for manager in managers:
        manager.stop()


def states(manager: Manager[TextModel], name: str = "m") -> dict[int, State]:
    try:
        return {entry.number: entry.state for entry in manager.status(name)}
    except ServingError:
        return {}


def test_a_used_version_is_closed_only_after_its_last_request(manage, tmp_path):
    """A newer version takes over at once; the old one stays usable to whoever holds it."""
    put(tmp_path, 1)
    manager = manage(ModelConfig("m", tmp_path))
    until(lambda: states(manager) == {1: State.AVAILABLE})
    with manager.acquire("m") as first, manager.acquire("m", 1):
        put(tmp_path, 2)
        until(lambda: states(manager) == {2: State.AVAILABLE, 1: State.UNLOADING})
        with manager.acquire("m") as second:
            assert second.number == 2
        with pytest.raises(ServingError, match=r"Servable not found for request: Specific\(m, 1\)"):
            manager.acquire("m", 1)
        time.sleep(0.05)
        assert not first.servable.closed
    until(lambda: first.servable.closed)
    until(lambda: states(manager)[1] is State.END)


def test_the_old_version_is_never_gone_before_the_new_one_is_there(manage, tmp_path):
    """Somebody asks all the time while ten versions come."""
    put(tmp_path, 1)
    manager = manage(ModelConfig("m", tmp_path))
    until(lambda: states(manager))
    until(lambda: State.AVAILABLE in states(manager).values())
    failures: list[ServingError] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                with manager.acquire("m") as lease:
                    assert not lease.servable.closed
            except ServingError as err:
                failures.append(err)

    asker = threading.Thread(target=ask)
    asker.start()
    for version in range(2, 12):
        put(tmp_path, version)
        until(lambda version=version: states(manager).get(version) is State.AVAILABLE)
    done.set()
    asker.join()
    assert failures == []


def test_a_bad_version_leaves_the_old_one_and_tells_why(manage, tmp_path):
    """Its status holds code and reason."""
    put(tmp_path, 1)
    manager = manage(ModelConfig("m", tmp_path))
    until(lambda: states(manager) == {1: State.AVAILABLE})
    put(tmp_path, 2, "bad")
    until(lambda: states(manager) == {1: State.AVAILABLE, 2: State.END})
    failed = manager.status("m", 2)[0]
    assert (failed.status, failed.message) == (Code.DATA_LOSS, "the graph is damaged")
    assert manager.acquire("m").number == 1


def test_a_start_beside_a_bad_newest_version_serves_the_one_before_it(manage, tmp_path):
    """Otherwise a restart after a bad release would be an outage."""
    put(tmp_path, 1)
    put(tmp_path, 2)
    put(tmp_path, 3, "bad")
    manager = manage(ModelConfig("m", tmp_path))
    until(lambda: states(manager) == {3: State.END, 2: State.AVAILABLE})


def test_a_bad_version_is_tried_again_when_its_files_change(manage, tmp_path):
    """A copy that was not finished, or a mended release, needs no restart."""
    put(tmp_path, 1)
    bad = put(tmp_path, 2, "bad")
    manager = manage(ModelConfig("m", tmp_path), max_retries=0)
    until(lambda: states(manager) == {1: State.AVAILABLE, 2: State.END})
    (bad / "saved_model.pb").write_text("mended")
    until(lambda: states(manager) == {2: State.AVAILABLE, 1: State.END})


def test_a_failed_load_is_retried_as_often_as_configured(tmp_path):
    """max_retries further tries, then no more."""
    put(tmp_path, 1)
    tries = []

    def load(_name: str, number: int, _path: Path) -> TextModel:
        tries.append(number)
        raise ServingError(Code.UNAVAILABLE, "not yet")

    manager = Manager(load, poll_s=0.005, max_retries=2, retry_s=0.02)
    manager.start([ModelConfig("m", tmp_path)])
    until(lambda: len(tries) == 3)
    time.sleep(0.1)
    manager.stop()
    assert len(tries) == 3


@pytest.mark.parametrize("loss", ["emptied", "gone", "a file", "unreadable"])
def test_losing_the_storage_unloads_nothing(manage, tmp_path, loss):
    """A loaded model outlives its folder, and the folder's return changes nothing."""
    base_path = tmp_path / "models"
    put(base_path, 1)
    manager = manage(ModelConfig("m", base_path))
    until(lambda: states(manager) == {1: State.AVAILABLE})
    aside = base_path.rename(tmp_path / "aside")
    if loss == "emptied":
        base_path.mkdir()
    elif loss == "a file":
        base_path.write_text("")
    elif loss == "unreadable":
        base_path.symlink_to(base_path)  # a loop: every access fails, for root too
    time.sleep(0.05)
    assert states(manager) == {1: State.AVAILABLE}
    assert manager.acquire("m").number == 1
    if base_path.is_dir():
        base_path.rmdir()
    else:
        base_path.unlink(missing_ok=True)
    aside.rename(base_path)
    put(base_path, 2)
    until(lambda: states(manager).get(2) is State.AVAILABLE)


def test_removing_the_newest_folder_goes_back_to_the_one_before(manage, tmp_path):
    """A rollback by deletion: the older version is loaded first."""
    put(tmp_path, 1)
    newest = put(tmp_path, 2)
    manager = manage(ModelConfig("m", tmp_path))
    until(lambda: states(manager) == {2: State.AVAILABLE})
    newest.rename(tmp_path / "withdrawn")
    until(lambda: states(manager) == {1: State.AVAILABLE, 2: State.END})


@pytest.mark.parametrize("name", ["tmp-7", "7.tmp", "-7", "+7", "7 ", "٧", "0x7", "99999999999999999999"])
def test_a_folder_whose_name_is_no_version_is_ignored(manage, tmp_path, name):
    """Half-written versions have such names."""
    put(tmp_path, 1).rename(tmp_path / name)
    put(tmp_path, 1)
    manager = manage(ModelConfig("m", tmp_path))
    until(lambda: states(manager) == {1: State.AVAILABLE})
    time.sleep(0.03)
    assert states(manager) == {1: State.AVAILABLE}


def test_a_folder_without_a_graph_is_ignored(manage, tmp_path):
    """The graph is what makes a folder a version."""
    put(tmp_path, 1)
    (tmp_path / "2" / "variables").mkdir(parents=True)
    manager = manage(ModelConfig("m", tmp_path))
    until(lambda: states(manager) == {1: State.AVAILABLE})
    time.sleep(0.03)
    assert states(manager) == {1: State.AVAILABLE}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [(Latest(1), {4}), (Latest(2), {4, 3}), (All(), {1, 3, 4}), (Specific(frozenset({1, 9})), {1})],
)
def test_the_version_policy_decides_what_is_loaded(manage, tmp_path, policy, expected):
    """Version 2 is bad; 9 does not exist."""
    for version, text in {1: "good", 2: "bad", 3: "good", 4: "good"}.items():
        put(tmp_path, version, text)
    manager = manage(ModelConfig("m", tmp_path, policy))

    def available() -> set[int]:
        return {number for number, state in states(manager).items() if state is State.AVAILABLE}

    until(lambda: available() == expected)
    time.sleep(0.03)
    assert available() == expected


def test_labels_name_versions_and_move_to_loaded_ones_only(manage, tmp_path):
    """A label that moved to a version that is not there would be an outage for its users."""
    put(tmp_path, 1)
    put(tmp_path, 2)
    manager = manage(ModelConfig("m", tmp_path, All(), {"stable": 1}))
    until(lambda: states(manager) == {1: State.AVAILABLE, 2: State.AVAILABLE})
    assert manager.acquire("m", label="stable").number == 1
    with pytest.raises(ServingError, match="Unrecognized servable version label: canary"):
        manager.acquire("m", label="canary")
    with pytest.raises(ServingError, match="not currently available"):
        manager.reconfigure([ModelConfig("m", tmp_path, All(), {"stable": 3})])
    manager.reconfigure([ModelConfig("m", tmp_path, All(), {"stable": 2})])
    assert manager.acquire("m", label="stable").number == 2


def test_a_label_moves_when_its_version_is_there_and_not_before(manage, tmp_path):
    """Even where labels may name what is not loaded: whoever asks by label is never left without a version."""
    put(tmp_path, 1)
    manager = manage(ModelConfig("m", tmp_path, Specific(frozenset({1})), {"stable": 1}), labels_may_dangle=True)
    until(lambda: states(manager) == {1: State.AVAILABLE})
    put(tmp_path, 2, "bad")
    manager.reconfigure([ModelConfig("m", tmp_path, Specific(frozenset({2, 3})), {"stable": 2})])
    put(tmp_path, 3)
    until(lambda: states(manager) == {1: State.AVAILABLE, 2: State.END, 3: State.AVAILABLE})
    assert manager.acquire("m", label="stable").number == 1
    (tmp_path / "2" / "saved_model.pb").write_text("mended")
    until(lambda: states(manager).get(2) is State.AVAILABLE)
    assert manager.acquire("m", label="stable").number == 2


def test_a_new_configuration_adds_and_removes_models(manage, tmp_path):
    """It returns when the new model answers; the removed one is unloaded."""
    put(tmp_path / "a", 1)
    put(tmp_path / "b", 1)
    manager = manage(ModelConfig("a", tmp_path / "a"))
    until(lambda: states(manager, "a") == {1: State.AVAILABLE})
    with manager.acquire("a") as lease:
        manager.reconfigure([ModelConfig("b", tmp_path / "b")])
        assert manager.acquire("b").number == 1
        with pytest.raises(ServingError, match=r"Servable not found for request: Latest\(a\)"):
            manager.acquire("a")
        assert not lease.servable.closed
    until(lambda: lease.servable.closed)


def test_a_configuration_whose_model_cannot_load_says_why(manage, tmp_path):
    """The caller of the reload gets the reason."""
    put(tmp_path / "a", 1)
    put(tmp_path / "b", 1, "bad")
    manager = manage(ModelConfig("a", tmp_path / "a"))
    with pytest.raises(ServingError, match=r"model b has no loaded version .*the graph is damaged"):
        manager.reconfigure([ModelConfig("a", tmp_path / "a"), ModelConfig("b", tmp_path / "b")])
    assert manager.acquire("a").number == 1


def test_those_who_follow_hear_of_every_change(manage, tmp_path):
    """Health hangs on it: no version yet, then one."""
    heard: list[dict[str, bool]] = []
    manager = manage(ModelConfig("m", tmp_path / "models"), on_change=lambda serving: heard.append(dict(serving)))
    until(lambda: heard == [{"m": False}])
    put(tmp_path / "models", 1)
    until(lambda: heard[-1] == {"m": True})
    manager.stop()
