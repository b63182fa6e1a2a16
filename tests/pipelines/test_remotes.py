"""DVC remotes: a folder beside the checkout as it comes, S3 by configuration; what is damaged there is not used."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import BotoCoreError

from pipelines import versioning
from pipelines.dataset import DataError
from pipelines.ingest import ingest
from pipelines.settings import Settings
from tests.conftest import HANG_S, ROOT
from tests.pipelines.conftest import run
from tests.ports import free_port

KEYS = {"AWS_ACCESS_KEY_ID": "digits", "AWS_SECRET_ACCESS_KEY": "digits", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    """An S3 endpoint: moto's server, a process of its own that speaks HTTP."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **KEYS},
    )  # fmt: skip
    try:
        for _ in range(300):
            try:
                s3_client(url).create_bucket(Bucket="team")
                break
            except BotoCoreError:
                assert server.poll() is None
                time.sleep(0.1)
        yield url
    finally:
        server.kill()
        server.wait(HANG_S)


def s3_client(url: str) -> "boto3.client":
    keys = {"aws_access_key_id": "digits", "aws_secret_access_key": "digits", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=url, **keys)


def dvc(project: Path, *words: str) -> None:
    done = run(project, "dvc", *words, **KEYS)
    assert done.returncode == 0, done.stdout + done.stderr


def fresh_clone(project: Path) -> Settings:
    """As `git clone` leaves it: settings and records, neither data nor cache."""
    clone = project.with_name("clone")
    shutil.rmtree(clone, ignore_errors=True)
    shutil.copytree(project, clone, ignore=shutil.ignore_patterns("data", "cache", "tmp", "run", "clone"))
    return Settings(project=clone)


def push(project: Path) -> None:
    with versioning.open_repo(Settings(project=project)) as repo:
        repo.push()


def test_folder_beside_the_checkout_is_the_remote_as_it_comes(toy: Path) -> None:
    """Nothing to set up: `dvc push` makes it, a clone beside gets its data from it; until then nothing is amiss.

    An object damaged there is refused by name, where DVC alone would say that all was fetched.
    """
    assert (toy / ".dvc" / "config").read_bytes() == (ROOT / ".dvc" / "config").read_bytes()
    assert ingest(Settings(project=toy)).source == "already here"
    clone = fresh_clone(toy)
    with pytest.raises(DataError, match=r"no source had the raw data \(DVC cache: [^;]*\)\. .*push it"):
        ingest(clone)
    push(toy)
    remote = toy.parent / "digits-dvc"
    assert ingest(clone).source == "DVC remote"
    assert (clone.data_dir / "images").read_text() == "images"

    (stored,) = [path for path in remote.rglob("*") if path.is_file() and path.read_bytes() == b"images"]
    stored.chmod(0o644)
    stored.write_bytes(b"imagEs")
    clone = fresh_clone(toy)
    with pytest.raises(DataError, match="DVC remote: holds a damaged object of images: not used"):
        ingest(clone)
    assert not clone.data_dir.exists()


def test_s3_bucket_serves_a_fresh_clone_and_is_cleaned_of_old_versions(
    toy: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/data.md says: configure, push, clone, ingest; damage is refused; gc keeps what is recorded."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    dvc(toy, "remote", "add", "--default", "team", "s3://team/digits")
    dvc(toy, "remote", "modify", "team", "verify", "true")
    dvc(toy, "remote", "modify", "team", "endpointurl", s3_url)
    for key in ("access_key_id", "secret_access_key"):
        dvc(toy, "remote", "modify", "--local", "team", key, "digits")
    push(toy)
    s3 = s3_client(s3_url)
    assert len(stored(s3)) == 3  # images, labels, and the list of them
    clone = fresh_clone(toy)
    assert ingest(clone).source == "DVC remote"
    assert (clone.data_dir / "labels").read_text() == "labels"

    (key,) = [key for key, content in stored(s3).items() if content == b"images"]
    s3.put_object(Bucket="team", Key=key, Body=b"imagEs")
    with pytest.raises(DataError, match="DVC remote: holds a damaged object of images: not used"):
        ingest(fresh_clone(toy))
    s3.put_object(Bucket="team", Key=key, Body=b"images")

    (toy / "data" / "labels").write_text("other labels")
    with versioning.open_repo(Settings(project=toy)) as repo:
        versioning.record_data(repo, replace=True)
    push(toy)
    assert len(stored(s3)) == 5
    dvc(toy, "gc", "--workspace", "--cloud", "--force", "--quiet")
    assert sorted(content for content in stored(s3).values() if content[:1] != b"[") == [b"images", b"other labels"]


def stored(s3: "boto3.client") -> dict[str, bytes]:
    """Key -> content of everything in the bucket."""
    keys = [one["Key"] for one in s3.list_objects_v2(Bucket="team").get("Contents", [])]
    return {key: s3.get_object(Bucket="team", Key=key)["Body"].read() for key in keys}
