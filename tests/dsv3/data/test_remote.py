import http.server
import io
import json
import socket
import threading
import time
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsv3.artifacts import sha256_bytes
from dsv3.data import remote
from dsv3.data.remote import Unreachable, fetch, fetch_tiny_shakespeare, fetch_tiny_shakespeare_within

TEXT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"


@contextmanager
def serving(answers):
    """A web server on this machine: path -> body, or a status for a path that fails."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = answers.get(self.path, 404)
            self.send_response(answer if isinstance(answer, int) else 200)
            body = b"" if isinstance(answer, int) else answer
            self.send_header("Content-Length", str(len(body) + answers.get("missing bytes", 0)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.fixture
def sources(monkeypatch):
    """Directs both sources to an address, and takes TEXT for tiny Shakespeare."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote, "SHA256", sha256_bytes(TEXT))

    def direct(address):
        monkeypatch.setattr(remote, "GITHUB_URL", f"{address}/input.txt")
        monkeypatch.setenv("HF_ENDPOINT", address)

    return direct


def parquet(text):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": [text]}), buffer)
    return buffer.getvalue()


def hub_answers(revision, prefix):
    """The Hub's answers for a revision whose three parquet files hold TEXT."""
    parts = {"train": TEXT[:40], "validation": TEXT[40:50], "test": TEXT[50:]}
    base = f"/datasets/{remote.HUB_ID}"
    listing = [{"path": f"{prefix}/{split}/0000.parquet"} for split in ("test", "train", "validation")]
    answers = {f"/api{base}/tree/{revision}?recursive=true": json.dumps([{"path": "README.md"}, *listing]).encode()}
    for split, text in parts.items():
        answers[f"{base}/resolve/{revision}/{prefix}/{split}/0000.parquet"] = parquet(text.decode())
    return answers


def test_github_is_asked_first(sources):
    with serving({"/input.txt": TEXT}) as address:
        sources(address)
        text, origin = fetch_tiny_shakespeare(5)
    assert text == TEXT
    assert origin.source == "tiny_shakespeare"
    assert origin.origin == {"url": f"{address}/input.txt", "hub_id": "karpathy/tiny_shakespeare"}
    assert (origin.license, origin.title, origin.language) == ("public domain", "tiny Shakespeare", "en")


@pytest.mark.parametrize("revision", ["refs%2Fconvert%2Fparquet", "refs%2Fpr%2F2"])
def test_the_hubs_parquet_revisions_are_joined_in_the_order_of_the_text(sources, revision):
    with serving({"/input.txt": 403} | hub_answers(revision, "default")) as address:
        sources(address)
        text, origin = fetch_tiny_shakespeare_within(5)
    assert text == TEXT
    assert origin.origin["url"].endswith(revision)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({}, "GitHub: HTTP status 404; Hub refs/convert/parquet: HTTP status 404; Hub refs/pr/2: HTTP status 404"),
        ({"/input.txt": TEXT[:-1]}, "GitHub: its 60 bytes have another SHA-256"),
        ({"/input.txt": b"<html>please log in</html>"}, "another SHA-256"),
        ({"/input.txt": TEXT[:-5], "missing bytes": 5}, "GitHub: its 56 bytes have another SHA-256"),
        (
            {f"/api/datasets/{remote.HUB_ID}/tree/refs%2Fpr%2F2?recursive=true": b"<html>"},
            "Hub refs/pr/2: answers with something else than parquet files",
        ),
    ],
)
def test_a_wrong_answer_is_never_taken_and_every_source_says_why(sources, answers, reason):
    with serving(answers) as address:
        sources(address)
        with pytest.raises(Unreachable, match=reason.replace("/", ".")):
            fetch_tiny_shakespeare(5)


def test_a_damaged_parquet_file_is_no_text(sources):
    answers = hub_answers("refs%2Fpr%2F2", "data")
    answers[f"/datasets/{remote.HUB_ID}/resolve/refs%2Fpr%2F2/data/test/0000.parquet"] = b"PAR1"
    with serving(answers) as address:
        sources(address)
        with pytest.raises(Unreachable, match=r"something else than parquet files of text \(ArrowInvalid\)"):
            fetch_tiny_shakespeare(5)


def test_an_endless_answer_is_cut_off(sources, monkeypatch):
    monkeypatch.setattr(remote, "MAX_BYTES", 10)
    with serving({"/input.txt": TEXT}) as address:
        assert fetch(f"{address}/input.txt", 5) == TEXT[:10]


def test_a_refused_connection_is_answered_at_once_in_one_line(sources):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        sources(address)
        with pytest.raises(Unreachable, match=r"GitHub: .*refused.*; Hub .*refused") as error:
            fetch_tiny_shakespeare(5)
    assert "\n" not in str(error.value)


def test_a_source_that_never_answers_is_given_up_after_the_limit(sources, monkeypatch):
    monkeypatch.setattr(remote, "fetch_tiny_shakespeare", lambda timeout_s: time.sleep(60))
    with pytest.raises(Unreachable, match=r"no answer within 0.05 s"):
        fetch_tiny_shakespeare_within(0.05)
