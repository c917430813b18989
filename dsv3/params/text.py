"""Small text files of the user's, such as params.yaml: read whole, after a look at what they are."""

import errno
from pathlib import Path

from dsv3.artifacts import NotRegularFile, open_regular
from dsv3.errors import UserError

MAX_BYTES = 1 << 18
"""Twenty times what these files hold."""


def read_small_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises `OSError` where it can't be opened, and `UserError` in one line for what is no file of text: a pipe or a
    device, which could be read without end, other encodings, a NUL, or too many bytes.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
    except ValueError:
        raise OSError(errno.EINVAL, "it holds a NUL character") from None
    except NotRegularFile:
        raise UserError(f"{path}: is no regular file; name one") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: has more than {MAX_BYTES:,} bytes; must be smaller")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8 (byte {content[error.start]:#04x}); save it as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}:{line}: holds a NUL character; save it as UTF-8")
    return text
