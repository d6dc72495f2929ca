"""Mutations for the fuzzers: of bytes, of JSON trees, and of safetensors files.

Everything takes a `random.Random`, so that a load is made again from its seed and number.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

__all__ = [
    "as_text",
    "bytes_of",
    "edited",
    "pack_safetensors",
    "tensors_file",
    "unpack_safetensors",
]

WORDS = (
    *("", "float32", "float8_e4m3fn", "complex128", "__proto__", "layers.1.weight", "a" * 5000),
    *("\ud800", "\x1b[31m", "\0", "\u202e", "../../etc/passwd", "/dev/zero", "os:system", "{0}"),
    *("mlp", "resnet56", "torchvision:resnet18", "select", "*" * 50, "1e400", "9" * 5000, "%s%n"),
)
NUMBERS = (
    *(0, 1, -1, 2, 7, 40, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(0.5, -0.0, 1e-320, 1e300, 1e308, float("inf"), float("-inf"), float("nan"), 20_000_000),
)


def value(random: Random) -> Any:
    """Draw a value that a reader may not expect."""
    way = random.randrange(8)
    if way < 3:
        return random.choice(NUMBERS)
    if way < 5:
        return random.choice(WORDS)
    if way == 5:
        return random.choice((None, True, False, [], {}, [[]], {"": None}))
    if way == 6:
        nested: Any = random.choice((1, "x", None))
        for _ in range(random.choice((3, 60, 120, 250))):
            nested = [nested] if random.random() < 0.5 else {random.choice("+*ax"): [nested]}
        return nested
    return [random.choice((0, 1, 3, "a", None, 1e9))] * random.choice((1, 5, 1000))


def edited(data: Any, random: Random) -> Any:
    """Change a JSON tree, which is changed in place, at one to three nodes."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        holders = _holders(data)
        if not holders:
            return value(random)
        if random.random() < 0.01:
            return value(random)
        random.choice(EDITS)(random.choice(holders), random, holders)
    return data


def _holders(data: Any) -> list[Any]:
    """List every list and mapping of a tree that is not empty."""
    found, left = [], [data]
    while left:
        item = left.pop()
        if isinstance(item, dict | list) and item:
            found.append(item)
            left += item.values() if isinstance(item, dict) else item
    return found


def _key(holder: Any, random: Random) -> Any:
    return random.choice(list(holder if isinstance(holder, dict) else range(len(holder))))


def _replace(holder: Any, random: Random, holders: list[Any]) -> None:
    holder[_key(holder, random)] = value(random)


def _delete(holder: Any, random: Random, holders: list[Any]) -> None:
    del holder[_key(holder, random)]


def _swap(holder: Any, random: Random, holders: list[Any]) -> None:
    other = random.choice([item for item in holders if item] or [[0]])
    if holder:
        a, b = _key(holder, random), _key(other, random)
        holder[a], other[b] = json.loads(json.dumps([other[b], holder[a]]))


def _rename(holder: Any, random: Random, holders: list[Any]) -> None:
    if isinstance(holder, dict):
        name = random.choice((random.choice(WORDS), random.choice(list(holder))))
        holder[name] = holder.pop(_key(holder, random))


def _insert(holder: Any, random: Random, holders: list[Any]) -> None:
    if isinstance(holder, dict):
        holder[random.choice(WORDS)] = value(random)
    else:
        holder.insert(random.randrange(len(holder) + 1), value(random))


def _number(holder: Any, random: Random, holders: list[Any]) -> None:
    """Move one number a little or a lot."""
    keys = holder if isinstance(holder, dict) else range(len(holder))
    known = [key for key in keys if type(holder[key]) in (int, float)]
    if known:
        key = random.choice(known)
        old = holder[key]
        options = (old + 1, old - 1, -old, 2 * old, old * 1000, f"{old}", old == 1, [old], None)
        holder[key] = random.choice(options)


def _double(holder: Any, random: Random, holders: list[Any]) -> None:
    key = _key(holder, random)
    again = json.loads(json.dumps(holder[key]))
    if isinstance(holder, dict):
        holder[f"{key}{random.choice(('', '2', '.weight'))}"] = again
    else:
        holder.insert(key, again)


EDITS: tuple[Callable[[Any, Random, list[Any]], None], ...] = (
    *(_replace, _replace, _delete, _swap, _rename, _insert, _number, _number, _double),
)


def as_text(data: Any, random: Random) -> str:
    """Write a tree as JSON, now and then with a name twice or as what JSON has no word for."""
    text = json.dumps(data)
    way = random.random()
    if way < 0.02:
        text = text.replace("{", '{"schema_version": 2, ', 1)
    elif way < 0.04:
        text = text.replace(": ", ": " + "[" * random.choice((5, 5000)), 1)
    elif way < 0.06:
        digits = [i for i, c in enumerate(text) if c.isdigit()]
        if digits:
            at = random.choice(digits)
            text = text[:at] + "7" * random.choice((20, 400, 5000)) + text[at:]
    return text


def bytes_of(content: bytes, random: Random) -> bytes:
    """Change some bytes: flipped bits, cuts, insertions, repetitions."""
    found = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(len(found) + 1)
        way, span = random.randrange(6), random.choice((1, 2, 8, 64, 500))
        if way < 2 and found:
            found[min(at, len(found) - 1)] ^= 1 << random.randrange(8)
        elif way == 2:
            del found[at : random.choice((None, at + span))]
        elif way == 3:
            found[at:at] = random.randbytes(span)
        elif way == 4:
            found[at:at] = found[at : at + span]
        else:
            found[at : at + span] = random.choice((b"\0", b"\xff", b"[", b'"', b"9")) * span
    return bytes(found)


def unpack_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a safetensors file into its header and its data."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def pack_safetensors(header: Any, data: bytes, length: int | None = None) -> bytes:
    """Join a header and data to a safetensors file."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensors_file(content: bytes, random: Random) -> bytes:
    """Change a safetensors file: its header as a tree, types and shapes, its data, or its bytes."""
    way = random.randrange(10)
    if way < 3:
        return bytes_of(content, random)
    header, data = unpack_safetensors(content)
    if way < 5:
        return pack_safetensors(edited(header, random), data)
    if way < 7:
        name = random.choice([name for name in header if name != "__metadata__"])
        types = ("F64", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F4", "F6_E2M3", "F8_E8M0", "C64")
        header[name]["dtype"] = random.choice((*types, "I64", "I32", "U8", "BOOL", "U64", "X"))
        if random.random() < 0.7:  # a shape that goes with it
            start, end = header[name]["data_offsets"]
            header[name]["shape"] = [(end - start) // random.choice((1, 2, 4, 8))]
        return pack_safetensors(header, data)
    if way < 9:
        return pack_safetensors(
            header, bytes_of(data, random) if random.random() < 0.3 else (_numbers(data, random))
        )
    return pack_safetensors(header, data, random.choice((0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1)))


def _numbers(data: bytes, random: Random) -> bytes:
    """Put an odd float32 somewhere, and keep the length."""
    if len(data) < 4:
        return data
    at = random.randrange(len(data) // 4) * 4
    known = (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f")  # NaN, infinity, the largest
    odd = random.choice((*known, random.randbytes(4)))
    return data[:at] + odd + data[at + 4 :]
