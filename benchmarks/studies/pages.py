"""Pages that are partly written, partly generated: what stands between two comments is a command's, the rest ours."""

import re
from pathlib import Path

from dsv3.artifacts import write_text
from dsv3.errors import UserError


def replace_section(page: Path, name: str, text: str) -> None:
    """Put `text` between the comments `<!-- begin NAME -->` and `<!-- end NAME -->`; `UserError` without them."""
    pattern = re.compile(rf"(<!-- begin {name} -->).*?(<!-- end {name} -->)", flags=re.DOTALL)
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    new, count = pattern.subn(lambda match: f"{match[1]}\n\n{text.strip()}\n\n{match[2]}", old)
    if count != 1:
        raise UserError(f"{page}: {count} sections between <!-- begin {name} --> and <!-- end {name} -->; must be 1")
    write_text(page, new)
