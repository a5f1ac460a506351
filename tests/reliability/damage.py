"""Ways of damaging a file: bytes that a disk or a transfer spoils, and contents that somebody has made up."""

from __future__ import annotations

import io
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damaged = tuple[str, bytes]  # what was done, and the bytes

# What is no ordinary number, name, list or table; as JSON text, since no writer of JSON would write some of it.
ODD_JSON = (
    *("null", "true", "false", "0", "-1", "1.5", "1e999", "-1e999", "NaN", "-Infinity", "-0.0", "1e-320"),
    *("9" * 30, "9" * 400, "9" * 5000, "0." + "0" * 400 + "1", "[]", "{}", "[1, 2, 3]", '[["a"], {"b": 1}]'),
    *('""', '" "', '"1e999"', '"nan"', '"\\ud800"', '"\\udfff tail"', '"a\\u0000b"', '"\\u202eabc"', '"e\\u0301"'),
    *(
        '"\\u001b[2J\\u001b]0;title\\u0007"',
        '"[bold red]x[/bold red]"',
        '"[/]"',
        '"a\\nerror: b\\r\\nc"',
        '"\\u0085\\u2028"',
    ),
    *('".."', '"../../up"', '"/"', '"C:\\\\x"', f'"{"x" * 300}"', f'"{"x" * 5000}"', f'"{"é" * 200}"'),
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 50_000 + "1" + "}" * 50_000,
    f'{{"{"k" * 5000}": 1}}',
)
ODD_YAML = (
    *("", "null", "true", "no", "-1", "0", ".nan", ".inf", "-.inf", "1e999", "1e-999", "9" * 400, "9" * 5000, "0x1F"),
    *(
        "1_000",
        "2001-01-01",
        "=",
        "<<",
        "~",
        "[]",
        "[[]]",
        "{a: 1}",
        "{[1]: 2}",
        "'x",
        '"\\ud800"',
        "\ud800",
        "\x1b[31m",
    ),
    *(
        "!!python/object/apply:os.abort []",
        "!!binary aGk=",
        "!!set {a}",
        "!unknown 1",
        "&a [*a]",
        "*b",
        "1\n2",
        "x" * 5000,
    ),
    "[" * 3000 + "]" * 3000,
    "&a [1,1,1,1,1,1,1,1,1], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]".join("[]"),
    "{a: &a [x,x,x,x,x,x,x,x], b: &b [*a,*a,*a,*a,*a,*a,*a,*a], c: &c [*b,*b,*b,*b,*b,*b,*b,*b], "
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c], e: &e [*d,*d,*d,*d,*d,*d,*d,*d], f: &f [*e,*e,*e,*e,*e,*e,*e,*e], "
    "g: &g [*f,*f,*f,*f,*f,*f,*f,*f], h: [*g,*g,*g,*g,*g,*g,*g,*g]}",
)


# -- any file


def truncated(rng: random.Random, content: bytes, _: bytes) -> Damaged:
    n = rng.randrange(len(content))
    return f"truncated at byte {n} of {len(content)}", content[:n]


def flipped(rng: random.Random, content: bytes, _: bytes) -> Damaged:
    bit = rng.randrange(8 * len(content))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return f"bit {bit % 8} of byte {bit // 8} flipped", bytes(changed)


def _range(rng: random.Random, content: bytes) -> tuple[int, int]:
    length = min(len(content), rng.choice((1, 4, 16, 64, 512, 4096)))
    begin = rng.randrange(len(content) - length + 1)
    return begin, begin + length


def zeroed(rng: random.Random, content: bytes, _: bytes) -> Damaged:
    a, b = _range(rng, content)
    return f"bytes {a} to {b} are 0", content[:a] + bytes(b - a) + content[b:]


def random_bytes(rng: random.Random, content: bytes, _: bytes) -> Damaged:
    a, b = _range(rng, content)
    return f"bytes {a} to {b} are random", content[:a] + rng.randbytes(b - a) + content[b:]


def duplicated(rng: random.Random, content: bytes, _: bytes) -> Damaged:
    a, b = _range(rng, content)
    return f"bytes {a} to {b} come twice", content[:b] + content[a:b] + content[b:]


def lost(rng: random.Random, content: bytes, _: bytes) -> Damaged:
    a, b = _range(rng, content)
    return f"bytes {a} to {b} are lost", content[:a] + content[b:]


def shuffled(rng: random.Random, content: bytes, _: bytes) -> Damaged:
    size = max(1, len(content) // rng.choice((3, 8, 20)))
    blocks = [content[i : i + size] for i in range(0, len(content), size)]
    rng.shuffle(blocks)
    return f"blocks of {size} bytes shuffled", b"".join(blocks)


def mixed(rng: random.Random, content: bytes, other: bytes) -> Damaged:
    a, b = _range(rng, content)
    at = rng.randrange(max(1, len(other) - (b - a)))
    return f"bytes {a} to {b} are of another file", content[:a] + other[at : at + b - a] + content[b:]


def whole(rng: random.Random, content: bytes, other: bytes) -> Damaged:
    page = b"<!DOCTYPE html>\n<title>404 Not Found</title>\n"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    ways = {
        "empty": b"",
        "another file": other,
        "a web page": page,
        "a pointer of git-lfs": pointer,
        "a mark of byte order before it": b"\xef\xbb\xbf" + content,
        "Latin-1 at its end": content + b"\xe9",
        "UTF-16": content.decode("latin-1").encode("utf-16"),
        "a tail of zeros": content + bytes(4096),
        "itself twice": content + content,
        "zeros": bytes(len(content)),
        "noise": rng.randbytes(len(content)),
        "a pickle": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00N.",
        "a line of 10 MB": b"x" * 10_000_000,
    }
    name = rng.choice(list(ways))
    return f"is {name}", ways[name]


ANY = (truncated, truncated, flipped, flipped, flipped, zeroed, random_bytes, duplicated, lost, shuffled, mixed, whole)

# What lies at its place in place of a file.


def _fifo(path: Path) -> None:
    os.mkfifo(path)


INSTEAD: dict[str, Callable[[Path], None]] = {
    "a folder": lambda path: path.mkdir(),
    "a FIFO": _fifo,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to /dev/null": lambda path: path.symlink_to("/dev/null"),
    "a link to /proc/self/mem": lambda path: path.symlink_to("/proc/self/mem"),
    "nothing": lambda path: None,
}


# -- JSON


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    found = []
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += [(value, key), *_places(each)]
    return found


_MARK = "@@@here@@@"


def json_text(rng: random.Random, text: str) -> tuple[str, str]:
    """One node, or one key, of a JSON becomes something odd."""
    value = json.loads(text)
    container, key = rng.choice(_places(value))
    odd = rng.choice(ODD_JSON)
    shown = odd if len(odd) < 40 else f"{odd[:20]}… ({len(odd)} characters)"
    way = rng.random()
    if way < 0.7:
        container[key] = _MARK
        return f"{key!r} becomes {shown}", json.dumps(value).replace(f'"{_MARK}"', odd)
    if way < 0.8 and isinstance(container, dict):
        odd = rng.choice([o for o in ODD_JSON if o.startswith('"')])
        container[_MARK] = container.pop(key)
        return f"key {key!r} becomes {odd[:40]}", json.dumps(value).replace(f'"{_MARK}"', odd)
    if way < 0.9 and isinstance(container, dict):
        container[_MARK] = rng.choice([None, container[key], 1, "x"])
        return f"key {key!r} comes twice", json.dumps(value).replace(f'"{_MARK}"', json.dumps(key))
    del container[key]
    return f"{key!r} is not there", json.dumps(value)


def odd_json(rng: random.Random, content: bytes, _: bytes) -> Damaged:
    what, text = json_text(rng, content.decode())
    return what, text.encode()


def odd_json_line(rng: random.Random, content: bytes, _: bytes) -> Damaged:
    lines = content.decode().splitlines()
    i = rng.randrange(len(lines))
    what, lines[i] = json_text(rng, lines[i])
    return f"line {i}: {what}", "".join(f"{line}\n" for line in lines).encode()


# -- others


def odd_cell(rng: random.Random, content: bytes, _: bytes) -> Damaged:
    """Of a CSV, or of words in lines."""
    lines = content.decode().splitlines()
    separator = "," if "," in lines[0] else " "
    i = rng.randrange(len(lines))
    cells = lines[i].split(separator)
    j = rng.randrange(len(cells))
    odd = rng.choice(
        [json.loads(o) for o in ODD_JSON if o.startswith('"')]
        + ["nan", "inf", "-1e999", "9" * 5000, '"', '"a""', "\0", ",,", "\t", "=1+1", "ſ", "１２"]
    )
    cells[j] = odd
    text = "".join(f"{line}\n" for line in [*lines[:i], separator.join(cells), *lines[i + 1 :]])
    return f"cell {j} of line {i} becomes {odd[:40]!r}", text.encode("utf-8", "surrogatepass")


def odd_npy(rng: random.Random, content: bytes, _: bytes) -> Damaged:
    """Another header of an .npy before the same data."""
    length = struct.unpack("<H", content[8:10])[0]
    data = content[10 + length :]
    headers = (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 8), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 8), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 8), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 0), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807, 2), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (8,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 8), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 1, 1, 1, 1, 8), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (10, 8), }",
        "{'descr': '<c8', 'fortran_order': False, 'shape': (10, 8), }",
        "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (10, 8), }",
        "{'descr': '|b1', 'fortran_order': False, 'shape': (10, 8), }",
        "{'descr': '<U4', 'fortran_order': False, 'shape': (10, 8), }",
        "{'descr': [('a', '<f4'), ('b', '|O')], 'fortran_order': False, 'shape': (10, 8), }",
        "{'descr': '<f4', 'fortran_order': 'no', 'shape': (10, 8), }",
        "{'descr': '<f4', 'shape': (10, 8), }",
        "__import__('os').abort()",
        "{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 200 + ")" * 200 + ", }",
        "",
    )
    header = rng.choice(headers)
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return f"header {header[:80]}", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def odd_safetensors(rng: random.Random, content: bytes, _: bytes) -> Damaged:
    """Another header before the same tensors, of the right length; or of another length."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length].decode(), content[8 + length :]
    if rng.random() < 0.15:
        wrong = rng.choice((0, 1, length - 1, length + 1, 10**8, 2**31, 2**63, 2**64 - 1))
        return f"header of {wrong} bytes, it says", struct.pack("<Q", wrong) + content[8:]
    value = json.loads(header)
    if rng.random() < 0.6:
        key = rng.choice(list(value["__metadata__"]))
        try:
            what, value["__metadata__"][key] = json_text(rng, value["__metadata__"][key])
        except (ValueError, IndexError):  # not JSON, or a number alone
            what, value["__metadata__"][key] = "nothing", ""
        what, header = f"metadata {key}: {what}", json.dumps(value)
    else:
        what, header = json_text(rng, header)
    raw = header.encode("utf-8", "surrogatepass")
    return what, struct.pack("<Q", len(raw)) + raw + data


def signed_again(rng: random.Random, content: bytes, other: bytes) -> Damaged:
    """Metadata of a checkpoint that somebody has made up, with the checksum that it then must have."""
    from safetensors.torch import load, save

    from d2net.checkpoint import CHECKSUM, KEY, checksum

    (length,) = struct.unpack("<Q", content[:8])
    metadata = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][KEY])
    del metadata[CHECKSUM]
    tensors = load(content)
    while True:
        what, text = json_text(rng, json.dumps(metadata))
        try:
            changed = json.loads(text)
            changed[CHECKSUM] = checksum(changed, tensors)
            return f"{what}, signed", save(tensors, {KEY: json.dumps(changed)})
        except (ValueError, TypeError, RecursionError):  # text that cannot be signed
            continue


def unlikely_numbers(rng: random.Random, content: bytes, _: bytes) -> Damaged:
    """NaN, Inf or a huge number among the tensors of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    at = 8 + length + 4 * rng.randrange((len(content) - 8 - length) // 4)
    number = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38))
    return f"{number} at byte {at}", content[:at] + struct.pack("<f", number) + content[at + 4 :]


def odd_pickled_npy(rng: random.Random, content: bytes, _: bytes) -> Damaged:
    """A pickled array of something else."""
    import numpy as np

    odd = rng.choice(
        (None, 3, [], {}, [[1, 2]], ["a"] * 10, [b"\xff"] * 10, [[["x"]]] * 10, [1e400] * 10, [object] * 10)
    )
    array = np.empty(len(odd) if isinstance(odd, list) else (), dtype=object)
    if isinstance(odd, list):
        array[:] = odd
    else:
        array[()] = odd
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return f"an array of {str(odd)[:40]}", stream.getvalue()


def odd_setting(rng: random.Random, content: bytes, _: bytes) -> Damaged:
    """Of one ``--set`` a line: another value, key, section, or form."""
    lines = content.decode().splitlines()
    i = rng.randrange(len(lines))
    key, _, _ = lines[i].partition("=")
    value = rng.choice(ODD_YAML)
    lines[i] = rng.choice((f"{key}={value}", f"{key}={value}", f"{key}={value}", f"{value}=1", key, f"loss.{value}=1"))
    return f"becomes {lines[i][:60]!r}", "\n".join(lines).replace("\0", "").encode("utf-8", "surrogatepass")
