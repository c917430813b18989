"""An S3 bucket as the place that runs are shared by: docs/sharing.md with a made-up S3 on this machine."""

import os
import sys
from pathlib import Path

import pytest

from tests.pipeline.laboratory import Laboratory

moto_server = pytest.importorskip("moto.server", reason="not among the dependencies: pip install 'moto[server]' dvc-s3")
pytest.importorskip("dvc_s3", reason="not among the dependencies: pip install 'moto[server]' dvc-s3")
pytestmark = [pytest.mark.pipeline, pytest.mark.filterwarnings("ignore")]  # moto's own


def test_a_second_clone_pulls_what_the_first_pushed_to_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "made-up")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        boto3 = pytest.importorskip("boto3")
        boto3.client("s3", endpoint_url=address).create_bucket(Bucket="bucket")
        first, second = Laboratory.at(tmp_path / "first"), Laboratory(tmp_path / "second")
        dvc = (sys.executable, "-m", "dvc")
        first.run(*dvc, "repro", "download")
        first.run(*dvc, "remote", "add", "--default", "storage", "s3://bucket/dsv3")
        first.run(*dvc, "remote", "modify", "storage", "endpointurl", address)
        first.commit("A text, and a place for it")
        first.run(*dvc, "push")
        first.run("git", "clone", "--quiet", os.fspath(first.root), os.fspath(second.root))
        second.run(*dvc, "pull", "download")
        assert (second.root / "data/corpus/text.txt").read_bytes() == (first.root / "verses.txt").read_bytes()
    finally:
        server.stop()
