import difflib
import os
from pathlib import Path

import pytest

from dsv3.data.plays import LAST_LINE, PLAYS, plays_text
from dsv3.data.wheel import plays

HEAD = "# A Play\n\n## ACT I\n\n### SCENE I. A street.\n\n"


def converted(scene):
    """The form of one invented scene; the end of the last play is appended and cut off again."""
    markdown = dict.fromkeys(PLAYS, HEAD) | {PLAYS[0]: HEAD + scene}
    end = f"**END**  \n{LAST_LINE}\n"
    text = plays_text(markdown | {PLAYS[-1]: HEAD + end + "\n**LATER**  \nMore.\n"})
    assert text.endswith(f"END:\n{LAST_LINE}\n")
    return text.removesuffix(f"END:\n{LAST_LINE}\n").removesuffix("\n")


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
        ("Windows line ends", "**Baker**  \r\nOh.\r\n\r\n**Dog**  \r\nWow.\r\n", "Baker:\nOh.\n\nDog:\nWow.\n"),
    ],
    ids=lambda value: value.replace(" ", "_") if " " in value and "\n" not in value else None,
)
def test_each_rule_of_the_form(rule, scene, expected):
    assert converted(scene) == expected


def test_what_stands_before_the_first_scene_is_left_out():
    prologue = "# A Play\n\n### PROLOGUE\n\n**Prologue**  \nListen.\n\n### SCENE I. A street.\n\n**Baker**  \nOh.\n"
    markdown = dict.fromkeys(PLAYS, prologue) | {PLAYS[-1]: f"{HEAD}**END**  \n{LAST_LINE}\n"}
    assert plays_text(markdown).count("Baker:\nOh.\n") == 8
    assert "Prologue" not in plays_text(markdown)


def test_the_plays_come_in_the_order_of_tiny_shakespeare():
    markdown = {name: f"{HEAD}**{name}**  \n{LAST_LINE}\n" for name in PLAYS[:-1]}
    markdown |= {PLAYS[-1]: f"{HEAD}**the-tempest**  \n{LAST_LINE}\n"}
    with pytest.raises(KeyError):
        plays_text({})
    assert plays_text(markdown) == f"{PLAYS[0]}:\n{LAST_LINE}\n"  # the first occurrence of the last line ends the text


@pytest.mark.skipif("DSV3_TINY_SHAKESPEARE" not in os.environ, reason="DSV3_TINY_SHAKESPEARE names no exact file")
def test_the_converted_plays_are_nearly_the_exact_tiny_shakespeare():
    exact = Path(os.environ["DSV3_TINY_SHAKESPEARE"]).read_text(encoding="utf-8").split("\n")
    ours = plays(timeout_s=30)[0].decode().split("\n")
    blocks = difflib.SequenceMatcher(None, ours, exact, autojunk=False).get_matching_blocks()
    assert sum(block.size for block in blocks) / len(exact) > 0.998
