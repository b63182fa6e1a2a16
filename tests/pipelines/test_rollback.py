"""Promotion and rollback as a client sees them: a real model server and a real gateway, one process each."""

import base64
import contextlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import pytest

from pipelines import model_server, serving_config, smoke
from pipelines.promotion import PromotionError, promote, rollback
from pipelines.run import model_server_command
from pipelines.settings import Settings
from pipelines.versions import find_version
from tests.conftest import HANG_S, HTTP, ROOT, clean_environment
from tests.pipelines.test_promotion import add_version
from tests.ports import free_ports

EXPORT = """
import sys
from pathlib import Path
from tests.serving.model_server.conftest import export_tiny
for number in (1, 2, 3):
    export_tiny(Path(sys.argv[1]) / str(number), number)
"""
SEVEN = (ROOT / "docs" / "seven.png").read_bytes()


@dataclass
class Served:
    """A project whose versions are served."""

    settings: Settings
    models: Path
    rest_url: str

    def publish(self, number: int) -> None:
        """A version that loads, and answers with its number."""
        folder = self.settings.versions_dir / str(number)
        add_version(self.settings, number)
        shutil.copytree(self.models / str(number), folder, dirs_exist_ok=True)

    def labelled(self) -> str:
        """The version that answers who asks the gateway for no version."""
        answer = HTTP.post(f"{self.rest_url}/classify", content=SEVEN, headers={"Content-Type": "image/png"})
        return answer.raise_for_status().json()["model_version"]

    def unlabelled(self) -> int:
        """What the model server answers who names neither version nor label: tiny models' digit is their version."""
        image = {"b64": base64.b64encode(png()).decode()}
        url = f"{self.settings.model_server_url}/v1/models/digits:predict"
        body = {"signature_name": "encoded", "instances": [{"image_bytes": image}]}
        return HTTP.post(url, json=body).raise_for_status().json()["predictions"][0]["digit"]

    def loaded(self) -> list[int]:
        states = model_server.version_states(self.settings) or {}
        return sorted(number for number, (state, _) in states.items() if state == model_server.AVAILABLE)


def png() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (28, 28), 7).save(buffer, "png")
    return buffer.getvalue()


def wait_for(what: str, there: object, limit_s: float = HANG_S) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if there():  # type: ignore[operator]
                return
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Version 1 promoted and served, versions 2 and 3 ready to be published."""
    project, models = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("models")
    environment = clean_environment(PYTHONPATH=str(ROOT), TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1")
    export = [sys.executable, "-c", EXPORT, str(models)]
    subprocess.run(export, cwd=ROOT, env=environment, check=True, capture_output=True)
    grpc, rest, gateway_rest, gateway_grpc = free_ports(4)
    settings = Settings(
        project=project, model_server_port=grpc, model_server_rest_port=rest,
        model_server_url=f"http://127.0.0.1:{rest}",
    )  # fmt: skip
    serving_config.ensure(settings)
    gateway = {
        "DIGITS_REST_PORT": str(gateway_rest), "DIGITS_GRPC_PORT": str(gateway_grpc),
        "DIGITS_UPSTREAM": f"127.0.0.1:{grpc}", "DIGITS_MODEL_LABEL": serving_config.LABEL,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for command, extra in (
            (model_server_command(settings), {}),
            ([sys.executable, "-m", "serving.gateway"], gateway),
        ):
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment | extra, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
        yours = Served(settings, models, f"http://127.0.0.1:{gateway_rest}")
        yours.publish(1)
        wait_for("version 1 to be loaded", lambda: yours.loaded() == [1])
        promote(settings, 1)
        wait_for("the gateway", lambda: HTTP.get(f"{yours.rest_url}/readyz").status_code == 200)
        yield yours


def test_published_is_not_served_until_it_is_promoted_and_back_again_without_a_failed_call(served: Served) -> None:
    """One client keeps asking all the while: each answer is of the version promoted then, and none fails."""
    assert served.labelled() == "1"
    served.publish(2)
    time.sleep(2)  # the model server has looked twice
    assert served.loaded() == [1]
    answers, failed, stop = [], [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                answers.append(served.labelled())
            except httpx.HTTPError as err:
                failed.append(str(err))

    client = threading.Thread(target=ask)
    client.start()
    try:
        up = promote(served.settings, 2)
        assert (up.confirmed, served.loaded(), served.labelled()) == (True, [1, 2], "2")
        down = rollback(served.settings)
        assert (down.confirmed, served.labelled()) == (True, "1")
        wait_for("the abandoned version to go", lambda: served.loaded() == [1])
        assert served.unlabelled() == 1
    finally:
        stop.set()
        client.join()
    assert failed == []
    changes = [now for before, now in pairwise(["", *answers]) if now != before]
    assert changes == ["1", "2", "1"]
    print(f"\npromotion {up.duration_s:.2f} s, rollback {down.duration_s:.2f} s, {len(answers)} answers meanwhile")


def test_rollback_command_from_its_start_to_the_gateways_answer(served: Served) -> None:
    """`python -m pipelines rollback` as a person types it; prints how long it took."""
    promote(served.settings, 2)
    started = time.monotonic()
    command = [sys.executable, "-m", "pipelines", "rollback"]
    environment = clean_environment(PYTHONPATH=str(ROOT), DIGITS_MODEL_SERVER_URL=str(served.settings.model_server_url))
    process = subprocess.Popen(command, cwd=served.settings.project, env=environment, stdout=subprocess.PIPE, text=True)
    wait_for("the gateway's answer", lambda: served.labelled() == "1")
    seconds = time.monotonic() - started
    said = process.communicate(timeout=HANG_S)[0]
    assert said.startswith("version 1 is served, in place of 2 (")
    assert "the model server says so too" in said
    print(f"\nrollback, from the command to the gateway's answer: {seconds:.2f} s")


def test_version_that_does_not_load_is_never_labelled(served: Served) -> None:
    """The model server's reason is said; what was served is served, and the file is as it was."""
    served.publish(3)
    (served.settings.versions_dir / "3" / "saved_model.pb").write_bytes(b"no graph")
    before = served.settings.serving_config_file.read_bytes()
    with pytest.raises(PromotionError, match=r"cannot load version 3: .*; version 1 stays"):
        promote(served.settings, 3)
    assert served.settings.serving_config_file.read_bytes() == before
    assert served.labelled() == "1"


def test_version_is_asked_before_it_is_served(served: Served) -> None:
    """The golden images go to the model server, for that very version; one that answers otherwise is not promoted."""
    settings = served.settings
    with contextlib.suppress(PromotionError):
        rollback(settings, 1)
    images = np.random.default_rng(7).integers(0, 256, (16, 28, 28), dtype=np.uint8)
    version = find_version(settings.versions_dir, 2)

    def check(loaded: bool) -> None:
        assert loaded
        assert smoke.ask_model_server(settings, version) == 16

    before = settings.serving_config_file.read_bytes()
    golden = version.folder / "assets.extra" / "golden.npz"
    np.savez(golden, images=images, probabilities=np.eye(10, dtype=np.float32)[np.full(16, 5)])
    with pytest.raises(smoke.SmokeFailed, match="answers otherwise with version 2 than it was trained to"):
        promote(settings, 2, check=check)
    assert settings.serving_config_file.read_bytes() == before
    assert served.labelled() == "1"
    wait_for("version 2 to go", lambda: served.loaded() == [1])

    asked = []

    def keep_answers(loaded: bool) -> None:
        asked.append(model_server.predict(settings, 2, images)[0])
        np.savez(golden, images=images, probabilities=asked[0])
        check(loaded)

    assert promote(settings, 2, check=keep_answers).confirmed
    assert (len(asked), served.labelled()) == (1, "2")
