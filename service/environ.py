"""How environment variables are found, and how their text becomes values.

A parser raises ValueError with what the text must be; it never repeats the text, which may be a secret.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from service.keyring import parse_secret_key

FILE = "_FILE"
_LARGEST_FILE = 65_536
_ACCEPTED_BY_NONE = "\0"
_SERVICE_LINK = re.compile(r"SERVICE_(HOST|PORT)\w*|PORT_\d+_\w+")
_SIZE = re.compile(r"(\d{1,12}) ?(?:([KMG])iB)?")
_SHIFTS = {None: 0, "K": 10, "M": 20, "G": 30}


def given(environ: Mapping[str, str], name: str) -> str | None:
    """The text of a variable, from itself or from the file it names; None if it is not given or empty.

    Raises ValueError that says what is wrong.
    """
    direct, file = environ.get(name, ""), environ.get(name + FILE, "")
    if direct and file:
        raise ValueError(f"and {name}{FILE} are both given: keep one")
    if not file:
        return direct or None
    try:
        with Path(file).open("rb") as opened:
            text = opened.read(_LARGEST_FILE + 1).decode()
    except OSError as error:
        raise ValueError(f"can't be read from {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"can't be read from {file}: it is not UTF-8 text") from None
    if len(text) > _LARGEST_FILE:
        raise ValueError(f"can't be read from {file}: it is larger than {_LARGEST_FILE} bytes")
    return text.strip() or None


def source(environ: Mapping[str, str], name: str) -> str | None:
    """Where the text of a variable that can be read comes from: the name of its file, or "" for itself; None if it is
    not given or empty.
    """
    return environ.get(name + FILE, "") if given(environ, name) else None


def strangers(environ: Mapping[str, str], prefix: str, names: Sequence[str]) -> Iterator[str]:
    """A fault for each variable with the prefix that is none of `names`, with the one that was probably meant."""
    known = [suffix for name in names for suffix in (name.removeprefix(prefix), name.removeprefix(prefix) + FILE)]
    for name in sorted(environ):
        own = name.removeprefix(prefix)
        if own == name or own in known:
            continue
        near = difflib.get_close_matches(own, known, n=1)
        if _SERVICE_LINK.fullmatch(own):
            hint = ": Kubernetes sets it for a service of that name; set enableServiceLinks to false"
        elif near:
            hint = f": did you mean {prefix}{near[0]}?"
        else:
            hint = ""
        yield f"{name} is not a setting{hint}"


def choice(options: type[StrEnum]) -> Callable[[str], StrEnum]:
    """One of the values of an enumeration."""

    def parse(text: str) -> StrEnum:
        try:
            return options(text)
        except ValueError:
            raise ValueError(f"must be {' or '.join(options)}") from None

    return parse


def whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number in a range."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return parse


def decimal(low: float, high: float) -> Callable[[str], float]:
    """A number in a range."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise ValueError(f"must be a number from {low:g} to {high:g}")
        return value

    return parse


def size(text: str) -> int:
    """A number of bytes, as such or in KiB, MiB or GiB."""
    found = _SIZE.fullmatch(text)
    value = int(found[1]) << _SHIFTS[found[2]] if found else 0
    if not 1 << 10 <= value <= 1 << 30:
        raise ValueError("must be a number of bytes, such as 33554432 or 32 MiB, from 1 KiB to 1 GiB")
    return value


def folder(text: str) -> Path:
    """The path of a folder, which need not be there."""
    if "\0" in text:
        raise ValueError("must be the path of a folder")
    return Path(text)


def listening_host(text: str) -> str:
    """A host name or an IP address to listen on."""
    if not re.fullmatch(r"[A-Za-z0-9_.:-]+", text):
        raise ValueError("must be a host name or an IP address to listen on")
    return text


def key_prefix(text: str) -> str:
    """A prefix of Redis keys, which stands in braces there."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,32}", text):
        raise ValueError("must be 1 to 32 letters, digits, dots, dashes or underscores")
    return text


def http_url(text: str) -> str:
    """The base address of an HTTP service, without a slash at its end."""
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("must be a URL with a valid host and port") from None
    if parts.scheme not in {"http", "https"} or not host or not re.fullmatch(r"[!-~]+", text):
        raise ValueError("must be a URL such as http://host or https://host/path")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("must be a URL without credentials, query or fragment")
    return text.rstrip("/")


def printable(text: str) -> str:
    """A secret that goes into a header or a form field."""
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("must be printable ASCII without spaces")
    return text


def secret_keys(text: str) -> tuple[bytes, ...]:
    """Secret keys, separated by commas or blanks."""
    keys = []
    for place, each in enumerate(re.findall(r"[^\s,]+", text), start=1):
        try:
            keys.append(parse_secret_key(each))
        except ValueError as error:
            raise ValueError(f"must be base64 of 32 bytes each, separated by commas: number {place} {error}") from None
    return tuple(keys)


def words(text: str) -> Mapping[str, str]:
    """Names with the upstream's words for them."""
    found: dict[str, str] = {}
    for pair in text.split(","):
        name, _, word = (part.strip() for part in pair.partition("="))
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) or not word or name in found:
            raise ValueError("must be pairs such as general=通用模型,anime=…, each name once and in lower case")
        found[name] = word
    if "general" not in found:
        raise ValueError("must have a pair for general, the default of a task")
    return found


def wanted(parse: Callable[[str], object]) -> str:
    """What a parser accepts, in the words that follow "must be" in its own complaint."""
    try:
        parse(_ACCEPTED_BY_NONE)
    except ValueError as error:
        return str(error).removeprefix("must be ").partition(": ")[0]
    raise TypeError(f"{parse} accepts anything")
