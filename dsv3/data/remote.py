"""The exact tiny Shakespeare, from GitHub or from the Hugging Face Hub.

The Hub's data set is a script, which `datasets` no longer runs; but converted copies lie in two of its revisions, one
row of text per split. Whatever is fetched counts only if its SHA-256 is the known one, so none has to be trusted.
Plain HTTP requests are used because `datasets` tries five times, half a minute, before it gives up.
"""

import http.client
import io
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from dsv3.artifacts import sha256_bytes
from dsv3.data.corpus import Origin
from dsv3.errors import UserError

SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
NUM_BYTES = 1_115_394
GITHUB_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
HUB_ID = "karpathy/tiny_shakespeare"
HUB_REVISIONS = ("refs/convert/parquet", "refs/pr/2")
HUB_SPLITS = ("train", "validation", "test")
MAX_BYTES = 8 << 20
"""No answer of a source is read further than this."""


class Unreachable(Exception):
    """A source did not give the text; the message says why."""


def tiny_shakespeare(timeout_s: float) -> tuple[bytes, Origin]:
    """Return the exact text and where it came from; raise `Unreachable` with every source's reason.

    `timeout_s` bounds each wait for a connection or for the next bytes.
    """
    sources: list[tuple[str, str, Callable[[], bytes]]] = [
        ("GitHub", GITHUB_URL, lambda: fetched(GITHUB_URL, timeout_s))
    ]
    for revision in HUB_REVISIONS:
        url = _hub_url("datasets", revision)
        sources.append((f"Hub {revision}", url, lambda revision=revision: _hub_text(revision, timeout_s)))
    reasons = []
    for name, url, fetch in sources:
        try:
            text = fetch()
        except Unreachable as error:
            reasons.append(f"{name}: {error}")
            continue
        if sha256_bytes(text) == SHA256:
            return text, Origin("tiny_shakespeare", {"url": url})
        reasons.append(f"{name}: its {len(text)} bytes have another SHA-256 than the {NUM_BYTES} known ones")
    raise Unreachable("; ".join(reasons))


def tiny_shakespeare_within(limit_s: float) -> tuple[bytes, Origin]:
    """Return what `tiny_shakespeare` does, or raise `Unreachable` after `limit_s` seconds at the latest.

    A name server that never answers can't be given a time limit; hence a thread, which is left behind if it hangs.
    """
    results: list[tuple[bytes, Origin]] = []
    reasons = [f"no answer within {limit_s:g} s"]

    def attempt() -> None:
        try:
            results.append(tiny_shakespeare(limit_s))
        except Unreachable as error:
            reasons.insert(0, str(error))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(limit_s)
    if results:
        return results[0]
    raise Unreachable(reasons[0])


def fetched(url: str, timeout_s: float) -> bytes:
    """Return what an HTTP GET gives; raise `Unreachable` for any failure, and for answers above MAX_BYTES."""
    request = urllib.request.Request(url, headers={"User-Agent": "dsv3-lab"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            data = response.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        error.close()
        raise Unreachable(f"HTTP status {error.code}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(
            str(error.reason if isinstance(error, urllib.error.URLError) else error) or type(error).__name__
        ) from None
    if len(data) > MAX_BYTES:
        raise Unreachable(f"answers with more than {MAX_BYTES} bytes")
    return data


def _hub_url(kind: str, revision: str, path: str = "") -> str:
    """Return an address of the data set on the Hub (`HF_ENDPOINT` may name a mirror)."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    verb = "tree" if kind == "api/datasets" else "resolve"
    return f"{endpoint}/{kind}/{HUB_ID}/{verb}/{quote(revision, safe='')}{path}"


def _hub_text(revision: str, timeout_s: float) -> bytes:
    """Return the text of the three splits of a revision, joined."""
    listing = fetched(_hub_url("api/datasets", revision, "?recursive=true"), timeout_s)
    try:
        paths = sorted(entry["path"] for entry in json.loads(listing) if entry["path"].endswith(".parquet"))
    except (ValueError, TypeError, KeyError):
        raise Unreachable("answers with something that is no list of files") from None
    text = ""
    for split in HUB_SPLITS:
        for path in (path for path in paths if split in path):
            text += _parquet_text(fetched(_hub_url("datasets", revision, f"/{quote(path)}"), timeout_s))
    return text.encode()


def _parquet_text(data: bytes) -> str:
    """Return the column `text` of a parquet file, its rows joined."""
    import pyarrow as pa  # only this way to the text needs it, and it takes a while to load
    import pyarrow.parquet as pq

    try:
        column: Any = pq.read_table(io.BytesIO(data), columns=["text"]).column("text")
        return "".join(column.to_pylist())
    except (pa.ArrowException, KeyError, TypeError) as error:
        raise Unreachable(f"holds a damaged parquet file ({type(error).__name__})") from None


def required_tiny_shakespeare(timeout_s: float) -> tuple[bytes, Origin]:
    """Return what `tiny_shakespeare` does; raise `UserError` where no source gives it."""
    try:
        return tiny_shakespeare(timeout_s)
    except Unreachable as error:
        raise UserError(
            f"data.source is tiny_shakespeare, which no source gives ({error}); "
            "set data.source to plays, or to file with a copy at data.path"
        ) from None
