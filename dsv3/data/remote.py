"""The exact tiny Shakespeare, from GitHub or from the Hugging Face Hub.

The Hub's data set is a script, which `datasets` no longer runs; but converted copies lie in two of its revisions, one
row of text per split. Whatever is fetched counts only if its SHA-256 is the known one, so none has to be trusted.
Plain HTTP requests are used because `datasets` tries five times, half a minute, before it gives up.
"""

import http.client
import io
import json
import os
import queue
import threading
import urllib.error
import urllib.request
from urllib.parse import quote

from dsv3.artifacts import sha256_bytes
from dsv3.data.corpus import Origin

SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
GITHUB_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
HUB_ID = "karpathy/tiny_shakespeare"
HUB_REVISIONS = ("refs/convert/parquet", "refs/pr/2")
HUB_SPLITS = ("train", "validation", "test")
MAX_BYTES = 8 << 20
"""No answer is read further than this."""


class Unreachable(Exception):
    """No address gave the text; the message says why."""


def fetch_tiny_shakespeare(timeout_s: float) -> tuple[bytes, Origin]:
    """Return the exact text and its origin; raise `Unreachable` with the reason of every address.

    `timeout_s` bounds each wait for a connection or for the next bytes.
    """
    reasons = []
    for name, revision in (("GitHub", None), *((f"Hub {revision}", revision) for revision in HUB_REVISIONS)):
        try:
            text = fetch(GITHUB_URL, timeout_s) if revision is None else _fetch_from_hub(revision, timeout_s)
        except Unreachable as error:
            reasons.append(f"{name}: {error}")
            continue
        if sha256_bytes(text) == SHA256:
            url = GITHUB_URL if revision is None else _hub_url("datasets", "resolve", revision)
            origin = {"url": url, "hub_id": HUB_ID}
            return text, Origin("tiny_shakespeare", origin, "public domain", "tiny Shakespeare", "en", "ROMEO:")
        reasons.append(f"{name}: its {len(text)} bytes have another SHA-256 than the known text")
    raise Unreachable("; ".join(reasons))


def fetch_tiny_shakespeare_within(limit_s: float) -> tuple[bytes, Origin]:
    """Do what `fetch_tiny_shakespeare` does, but raise `Unreachable` after `limit_s` seconds at the latest.

    A name server that never answers can't be given a time limit; hence a thread, which is left behind if it hangs.
    """
    answers: queue.SimpleQueue[tuple[bytes, Origin] | Unreachable] = queue.SimpleQueue()

    def attempt() -> None:
        try:
            answers.put(fetch_tiny_shakespeare(limit_s))
        except Unreachable as error:
            answers.put(error)

    threading.Thread(target=attempt, daemon=True).start()
    try:
        answer = answers.get(timeout=limit_s)
    except queue.Empty:
        raise Unreachable(f"no answer within {limit_s:g} s") from None
    if isinstance(answer, Unreachable):
        raise answer
    return answer


def fetch(url: str, timeout_s: float) -> bytes:
    """Return what an HTTP GET gives, at most `MAX_BYTES` of it; raise `Unreachable` for any failure."""
    request = urllib.request.Request(url, headers={"User-Agent": "dsv3-lab"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return response.read(MAX_BYTES)
    except urllib.error.HTTPError as error:
        error.close()
        raise Unreachable(f"HTTP status {error.code}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(str(getattr(error, "reason", error)) or type(error).__name__) from None


def _fetch_from_hub(revision: str, timeout_s: float) -> bytes:
    """Return the text of the three splits of a revision, joined."""
    import pyarrow.parquet as pq  # only this way to the text needs it, and it takes a while to load

    listing = fetch(_hub_url("api/datasets", "tree", revision, "?recursive=true"), timeout_s)
    try:
        paths = sorted(entry["path"] for entry in json.loads(listing) if entry["path"].endswith(".parquet"))
        text = ""
        for path in (path for split in HUB_SPLITS for path in paths if split in path):
            file = fetch(_hub_url("datasets", "resolve", revision, f"/{quote(path)}"), timeout_s)
            text += "".join(pq.read_table(io.BytesIO(file), columns=["text"]).column("text").to_pylist())
    except (ValueError, TypeError, KeyError) as error:  # pyarrow's own are among them
        raise Unreachable(f"answers with something else than parquet files of text ({type(error).__name__})") from None
    return text.encode()


def _hub_url(kind: str, verb: str, revision: str, path: str = "") -> str:
    """Return an address of the data set on the Hub (`HF_ENDPOINT` may name a mirror)."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{endpoint}/{kind}/{HUB_ID}/{verb}/{quote(revision, safe='')}{path}"
