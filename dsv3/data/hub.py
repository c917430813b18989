"""Any data set of the Hugging Face Hub as a corpus, read by `datasets` as a stream.

The data set's commit is asked for first, by one request with a time limit: so an unreachable Hub, a
wrong id or a missing permission is reported within seconds (`datasets` alone retries for half a minute), and the
manifest states exactly what was read, even where `data.hub_revision` is a branch.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3.data.corpus import Measure, Origin, write_documents
from dsv3.data.files import field_text
from dsv3.errors import UserError
from dsv3.params.data import DataParams


def write_hub(params: DataParams, directory: Path) -> tuple[Measure, Origin]:
    """Write one split of a Hub data set as the data file of the corpus in `directory`; `UserError` for any fault."""
    # Read when the libraries are imported: no torch in this stage, short waits, no retries.
    os.environ.setdefault("USE_TORCH", "NO")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(max(1, round(params.timeout_s))))
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(max(1, round(params.timeout_s))))
    hub_id = params.hub_id or ""
    commit = fetch_commit(hub_id, params.hub_revision, params.timeout_s)
    measure = write_documents(directory, _documents(params, hub_id, commit), hub_id)
    origin = {"hub_id": hub_id, "revision": commit, "config": params.hub_config_name, "split": params.hub_split}
    return measure, Origin("hub", origin, title=params.hub_id)


def fetch_commit(hub_id: str, revision: str | None, timeout_s: float) -> str | None:
    """Return the commit of a data set's revision; raise `UserError` where the Hub or the data set can't be reached."""
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().dataset_info(hub_id, revision=revision, timeout=timeout_s).sha
    except HfHubHTTPError as error:
        reason = _first_line(error)
    except (httpx2.HTTPError, OSError, ValueError) as error:
        reason = f"the Hub can't be reached: {_first_line(error)}"
    at = f" at revision {revision}" if revision else ""
    raise UserError(f"data.hub_id is {hub_id}{at}; it can't be read ({reason})")


def _documents(params: DataParams, hub_id: str, commit: str | None) -> Iterator[str]:
    """Yield the texts of the split, row by row."""
    import httpx2
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(
            hub_id, params.hub_config_name, split=params.hub_split, revision=commit, streaming=True
        )
        for number, row in enumerate(rows):
            yield field_text(row, params.text_field, f"{hub_id} ({params.hub_split}), row {number}")
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"data.hub_id is {hub_id}; reading it failed ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
