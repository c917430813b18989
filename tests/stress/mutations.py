"""Changes of an input, each with what it is: of values, of keys, of text, of bytes."""

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

DIGITS = "9" * 5000
ODD: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, -1, 7, 64, 10**4, 10**9, 2**63, 10**18, -(10**18), 10**400),
    *(0.0, -0.0, 0.1, 0.5, 1.5, 32.0, -1.0, 1e-46, 1e-300, 5e-324, 1e308, -1e308, float("inf"), float("nan")),
    *("", " ", "4", "32.0", "true", "null", "1e-3", "nonsense", "é", "x" * 10_000, "a\nb", "\0", "\u202e", "${seed}"),
    *([], [1], [[]], {}, {"a": 1}, ["a", None], {"": {}}),
]
NOT_A_FILE = ("fifo", "/dev/zero", "/dev/null", "folder", "missing", "link to itself")


class Mutant(NamedTuple):
    """A changed input."""

    what: str
    """The kind of change."""

    content: bytes | str
    """The file's bytes; a text names what stands in its place (`NOT_A_FILE`)."""

    key: str = ""
    """The key whose value was changed, if one was."""

    value: Any = None
    is_same: bool = False
    """Whether the changed file means what the unchanged one meant."""


Values = dict[str, Any]
Writer = Callable[[Any], str]


def leaves(values: Values, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths to all values that are no sections."""
    paths = []
    for key, value in values.items():
        paths += leaves(value, (*prefix, key)) if isinstance(value, dict) and value else [(*prefix, key)]
    return paths


def _at(values: Values, path: tuple[str, ...]) -> Values:
    for key in path:
        values = values[key]
    return values


def _misspelt(key: str, g: random.Random) -> str:
    i = g.randrange(len(key))
    return g.choice([key[:i] + key[i + 1 :], key + "s", key.upper(), key.replace("_", "-"), key[:i] + "x" + key[i:]])


def _value_near(value: Any, g: random.Random) -> Any:
    """Return an odd value, or a number that is off by a few powers of ten or of another type."""
    if isinstance(value, bool) or not isinstance(value, int | float) or g.random() < 0.5:
        return g.choice(ODD)
    return g.choice([value * 10 ** g.randint(1, 30), -value, value + 1, value - 1, float(value), str(value), value / 3])


def changed_value(values: Values, g: random.Random, write: Writer) -> Mutant:
    path = g.choice(leaves(values))
    new = copy.deepcopy(values)
    value = _at(new, path[:-1])[path[-1]] = _value_near(_at(values, path), g)
    is_same = type(value) is type(_at(values, path)) and value == _at(values, path)
    return Mutant("value", write(new).encode("utf-8", "surrogatepass"), path[-1], value, is_same)


def two_values(values: Values, g: random.Random, write: Writer) -> Mutant:
    new = copy.deepcopy(values)
    for path in g.sample(leaves(values), 2):
        _at(new, path[:-1])[path[-1]] = _value_near(_at(values, path), g)
    return Mutant("two values", write(new).encode("utf-8", "surrogatepass"))


def changed_key(values: Values, g: random.Random, write: Writer) -> Mutant:
    path = g.choice(leaves(values))
    new, key = copy.deepcopy(values), path[-1]
    section = _at(new, path[:-1])
    how = g.choice(["missing key", "misspelt key", "extra key", "moved key", "section replaced"])
    if how == "missing key":
        del section[key]
    elif how == "misspelt key":
        section[name := _misspelt(key, g)] = section.pop(key)
        key = name
    elif how == "extra key":
        key = g.choice(["hidden", "", "train.seed", "trust_remote_code", "é", "__class__", "0", "x" * 300])
        section[key] = g.choice(ODD)
    elif how == "moved key":
        _at(new, g.choice([p[:-1] for p in leaves(values)]))[key] = section.pop(key)
    else:
        key = g.choice(list(new))
        new[key] = g.choice(ODD)
    return Mutant(how, write(new).encode("utf-8", "surrogatepass"), key if how != "moved key" else "")


def damaged_bytes(content: bytes, g: random.Random) -> Mutant:
    """Return the bytes cut, flipped, overwritten, doubled or emptied."""
    how = g.choice(["truncated", "flipped", "overwritten", "doubled", "empty", "zeros", "hole", "swapped"])
    i, j = sorted((g.randrange(len(content)), g.randrange(len(content))))
    if how == "truncated":
        return Mutant(how, content[:i])
    if how == "flipped":
        return Mutant(how, content[:i] + bytes([content[i] ^ (1 << g.randrange(8))]) + content[i + 1 :])
    if how == "overwritten":
        return Mutant(how, content[:i] + g.randbytes(min(8, len(content) - i)) + content[i + 8 :])
    if how == "hole":
        return Mutant(how, content[:i] + content[j:])
    if how == "swapped":
        return Mutant(how, content[j:] + content[i:j] + content[:i])
    return Mutant(how, {"doubled": content + content, "empty": b"", "zeros": b"\0" * 100}[how])


def encoded_otherwise(content: bytes, g: random.Random) -> Mutant:
    """Return the text in another encoding, with other line ends or with characters that no one sees."""
    text = content.decode("utf-8")
    i = g.randrange(len(text))
    how = g.choice(
        ["utf-16", "utf-16-le", "utf-32", "latin-1", "bom", "crlf", "nul", "tab", "control", "lone surrogate"]
    )
    if how in ("utf-16", "utf-16-le", "utf-32"):
        return Mutant(how, text.encode(how))
    if how == "latin-1":
        return Mutant(how, content[:i] + "é".encode("latin-1") + content[i:])
    same = {"bom": b"\xef\xbb\xbf" + content, "crlf": content.replace(b"\n", b"\r\n")}
    if how in same:
        return Mutant(how, same[how], is_same=True)
    odd = {"nul": b"\0", "tab": b"\t", "control": b"\x1b[2J", "lone surrogate": b"\xed\xa0\x80"}[how]
    return Mutant(how, content[:i] + odd + content[i:])


def not_a_file(g: random.Random) -> Mutant:
    what = g.choice(NOT_A_FILE)
    return Mutant(what, what)


def hostile_yaml(content: bytes, g: random.Random) -> Mutant:
    """Return a text of YAML that a parser could be busy with for ever, or read as something else."""
    text, depth = content.decode("utf-8"), g.choice([40, 1_000, 100_000])
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 9)]
    hostile = {
        "alias bomb": "\n".join(["l0: &l0 [x, x]", *levels, text]),
        "alias of itself": f"{text}\nloop: &loop [*loop]\n",
        "merge key": text.replace("model:", "model: &m", 1) + "\nextra:\n  <<: *m\n",
        "digits": text.replace("seed: 1337", f"seed: {DIGITS}"),
        "hexadecimal digits": text.replace("seed: 1337", f"seed: 0x{'f' * 50_000}"),
        "deep brackets": f"{text}\nx: {'[' * depth}{']' * depth}\n",
        "deep braces": f"{text}\nx: {'{a: ' * depth}1{'}' * depth}\n",
        "deep dashes": f"{text}\nx:\n  {'- ' * depth}1\n",
        "deep questions": f"{text}\n{'? ' * depth}1\n",
        "python object": text.replace("seed: 1337", "seed: !!python/object/apply:os.system ['true']"),
        "two documents": f"{text}\n---\nseed: 1\n",
        "stated twice": f"{text}\nseed: 3\n",
        "directive": f"%YAML 9.9\n---\n{text}",
        "long line": f"{text}\n# {'x' * 300_000}\n",
        "many lines": f"{text}\n" + "#\n" * 100_000,
        "many keys": f"{text}\n" + "".join(f"k{n}: {n}\n" for n in range(4_000)),
        "date": text.replace("seed: 1337", "seed: 2001-13-99"),
        "set": text.replace("seed: 1337", "seed: !!set {1, 2}"),
        "binary": text.replace("seed: 1337", "seed: !!binary '===='"),
        "complex key": f"{text}\n[1, 2]: 3\n",
    }
    how = g.choice(list(hostile))
    return Mutant(how, hostile[how].encode())


def hostile_json(content: bytes, g: random.Random) -> Mutant:
    """Return a text of JSON that a parser could fail at."""
    text, depth = content.decode("utf-8").rstrip().rstrip("}"), g.choice([40, 1_000, 100_000])
    hostile = {
        "digits": f'{text}, "hidden_size": {DIGITS}}}',
        "deep brackets": f'{text}, "x": {"[" * depth}{"]" * depth}}}',
        "deep braces": text + ', "a": {"b": 1' + ', "c": {"b": 1' * depth + "}" * (depth + 2),
        "stated twice": f'{text}, "hidden_size": 64}}',
        "infinity": f'{text}, "rms_norm_eps": Infinity}}',
        "huge exponent": f'{text}, "rms_norm_eps": 1e999}}',
        "a list": f"[{text}}}]",
        "a number": "3",
        "null": "null",
        "a text": '"{}"',
        "trailing comma": f"{text},}}",
        "comment": f"{text}}} // a comment",
        "two objects": f"{text}}}\n{text}}}",
        "large": f'{text}, "x": "{"x" * 1_000_000}"}}',
        "many fields": text + "".join(f', "k{n}": {n}' for n in range(5_000)) + "}",
    }
    how = g.choice(list(hostile))
    return Mutant(how, hostile[how].encode())


def put(mutant: Mutant, path: Path) -> None:
    """Put the mutant where `path` is."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    if isinstance(mutant.content, bytes):
        path.write_bytes(mutant.content)
    elif mutant.content == "fifo":
        os.mkfifo(path)
    elif mutant.content == "folder":
        path.mkdir()
    elif mutant.content == "link to itself":
        path.symlink_to(path.name)
    elif mutant.content != "missing":
        path.symlink_to(mutant.content)


def json_text(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False)
