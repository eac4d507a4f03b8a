"""Keeps tokens out of what is written down: names that look secret, and the texts that their values are masked in.

>>> looks_secret("HF_TOKEN"), looks_secret("pad_token"), looks_secret("PYTHONHASHSEED")
(True, False, False)
>>> mask_words(["train.py", "--api-key", "k-123456", "hf_token=hf_abcdef", "lr=1e-3"])
['train.py', '--api-key', '***', 'hf_token=***', 'lr=1e-3']
"""

from __future__ import annotations

import ast
import contextlib
import functools
import html
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

MASK = "***"
MIN_LENGTH = 6  # of an environment variable's value: shorter ones would be found in innocent words
MIN_GIVEN_LENGTH = 4  # of a value that the caller knows to be secret
MIN_LINE_LENGTH = 12  # of a line of a secret of several lines (a private key)
MAX_HELD = 65536  # characters of a line without an end

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_ANYWHERE = ("SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "APIKEY", "PRIVATEKEY", "ACCESSKEY")
_WORDS = re.compile("TOKEN|AUTH|AUTHORIZATION|BEARER|COOKIE|JWT|(SSH|PG|DB|MYSQL|FTP|SMTP|ROOT|USER)?PASS|PWD|DSN")
_OF_SERVICES = re.compile("API|ACCESS|AUTH|REFRESH|SECRET|BEARER|HF|HUB|GITHUB|GH|GITLAB|AZURE|SLACK|WANDB")
# what a vocabulary calls its tokens, and what is told about a secret without telling it
_OF_VOCABULARIES = re.compile("PAD|MASK|BOS|EOS|CLS|SEP|UNK|SPECIAL|START|STOP|END|NEXT|PER")
_ABOUT = re.compile(
    "ACCURACY|BUDGET|COUNT|DICT|DIM|DIR|DIRECTORY|EMBEDDING|EXPIRY|FILE|FOLDER|FORMAT|IDS?|INDEX|KIND|LEN|LENGTH|LEVEL"
    "|LIMIT|LOSS|MAX|METHOD|MIN|MODE|NAMES?|PATH|RATE|SIZE|SOCK|SOCKET|TTL|TYPES?|UR[IL]|USER|VERSION"
)
_NOT_SECRET = ("PWD", "OLDPWD")
_PLAIN = re.compile(
    "true|false|none|null|default|auto|enabled|disabled|required|optional|always|never|online|offline|unknown"
    "|anonymous|basic|bearer|password|",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[-+]?[\d_.]+(e[-+]?\d+)?", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"://[^/\s:@]*:([^/\s@]+)@")


@functools.lru_cache(maxsize=4096)
def looks_secret(name: str) -> bool:
    """True where the value of a variable, parameter or flag of this name is not to be written down."""
    words = [word.upper() for word in _WORD.findall(name)]
    if not words or name in _NOT_SECRET or _ABOUT.fullmatch(words[-1]):
        return False
    joined = "".join(words)
    if any(part in joined for part in _ANYWHERE):
        return True
    if words[-1] == "KEY" or (words[-1] != "TOKEN" and words[-1].endswith("TOKEN")):  # GHTOKEN
        return True
    if len(words) > 1 and words[-1] in ("PAT", "TOKENS") and _OF_SERVICES.fullmatch(words[-2]):
        return True
    around = zip(["", *words], words, [*words[1:], ""], strict=False)
    return any(
        _WORDS.fullmatch(word)
        and not (word == "TOKEN" and (_OF_VOCABULARIES.fullmatch(before) or _ABOUT.fullmatch(after)))
        for before, word, after in around
    )


def mask(text: str, extra: Collection[str] = ()) -> str:
    """The text with `***` in the place of every secret of the environment, and of the given ones.

    A secret is found as it is and as Python, JSON, HTML and URLs spell it.

    Args:
        extra: further secret values; those of fewer than four characters are not looked for.
    """
    return _replace(text, _environment_secrets() | {value for value in extra if _is_findable(value, given=True)})


def mask_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which the values whose names look secret are `***`, in nested mappings too; other texts are masked."""
    known = secret_values(values)
    return {name: _mask_value(name, value, known) for name, value in values.items()}


def secret_values(values: Mapping[str, Any]) -> set[str]:
    """The values whose names look secret, and passwords inside URLs, as texts, for `mask`."""
    found = set()
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= secret_values(value)
            continue
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, Mapping):
                found |= secret_values(part)
            elif looks_secret(str(name)) and _is_told(part):
                found.add(str(part))
            elif isinstance(part, str):
                found.update(_URL_PASSWORD.findall(part))
    return found


def is_secret_text(name: str, value: Any) -> bool:
    """Whether a value is a text, or a list that holds one, which its name says is secret.

    A name of one word (`key`, `token`, `auth`) is many an innocent thing's inside of data.
    """
    if len(_WORD.findall(name)) < 2 and not any(part in name.upper() for part in _ANYWHERE):
        return False
    texts = value if isinstance(value, (list, tuple)) else [value]
    return looks_secret(name) and any(isinstance(text, str) and _is_findable(text) for text in texts)


def mask_words(words: Sequence[str]) -> list[str]:
    """A command line, masked: X in `--api-key X`, `--token=X`, `hf_token=X`, `-p hf_token X`, `'{"hf_token": "X"}'` and
    `https://user:X@host`; and the secrets of the environment.
    """
    masked: list[str] = []
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        is_value = before.startswith("--") and "=" not in before
        is_value |= i > 1 and words[i - 2] in ("-p", "--param", "--parameters")
        name, equals, value = word.partition("=")
        inside = _secrets_of_data(word) | _secrets_of_data(value)
        if is_value and looks_secret(before) and not word.startswith("--") and _is_told(word):
            masked.append(MASK)
        elif inside or word[:1] in ("{", "["):
            masked.append(mask(word, inside | secret_values({"": word})))
        elif equals and looks_secret(name) and _is_told(value):
            masked.append(f"{name}={MASK}")
        else:
            masked.append(mask(word, secret_values({"": word})))
    return masked


def mask_file(path: Path, extra: Collection[str] = ()) -> bool:
    """Rewrite a text file in place where it holds a secret; returns whether it did.

    What a child of a rank, or a library in C, prints passes no `masked_stream`.
    """
    raw = path.read_bytes()
    text = raw.decode("utf-8", errors="surrogateescape")
    masked = mask(text, extra).encode("utf-8", errors="surrogateescape")
    if masked == raw:
        return False
    path.write_bytes(masked)
    return True


class MaskedStream:
    """A text stream that passes on whole lines, masked, as soon as they are whole; `flush` passes on a begun one too.

    A begun line is held back from where a secret may have begun in it; each thread has its own, so that lines never
    mix. Secrets that the environment has had since the stream was made stay secret.
    """

    def __init__(self, stream: IO[str], extra: Collection[str] = ()) -> None:
        self._stream = stream
        self._held: dict[int, str] = {}  # by thread; no lock: a fork could inherit it locked
        self._secrets = {value for value in extra if _is_findable(value, given=True)}
        self._secrets |= _environment_secrets()

    def write(self, text: str) -> int:
        held = self._held.get(threading.get_ident(), "") + text
        self._pass_on(held, max(held.rfind("\n"), held.rfind("\r")) + 1)
        if len(held) > MAX_HELD:
            self.flush()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        held = self._held.get(threading.get_ident(), "")
        self._secrets |= _environment_secrets()
        self._pass_on(held, len(held) - _begun(held, self._secrets))

    def close(self) -> None:
        """Pass on what is left; the stream below stays open."""
        for held in list(self._held.values()):
            self._pass_on(held, len(held))
        self._held.clear()

    @property
    def buffer(self) -> MaskedBytes:
        """Takes bytes, for programs that write `sys.stdout.buffer`."""
        return MaskedBytes(self)

    def _pass_on(self, held: str, end: int) -> None:
        self._held[threading.get_ident()] = held[end:]
        if end:
            self._secrets |= _environment_secrets()
            self._stream.write(_replace(held[:end], self._secrets))
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:  # encoding, fileno, isatty and whatever else a program asks for
        return getattr(self._stream, name)


class MaskedBytes:
    """The binary side of a `MaskedStream`."""

    def __init__(self, stream: MaskedStream) -> None:
        self._stream = stream

    def write(self, data: bytes) -> int:
        self._stream.write(bytes(data).decode("utf-8", errors="replace"))
        return len(data)

    def flush(self) -> None:
        self._stream.flush()


def masked_stream(stream: IO[str], extra: Collection[str] = ()) -> MaskedStream:
    """Wrap `sys.stdout` or `sys.stderr` so that what is printed is masked, line by line."""
    return MaskedStream(stream, extra)


def _environment_secrets() -> set[str]:
    """Values of the environment that are worth masking, and the passwords in its URLs (a proxy's, a database's)."""
    secrets = set()
    for name, value in os.environ.items():
        if looks_secret(name) and _is_findable(value):
            secrets.add(value)
        elif "@" in value:
            secrets.update(word for word in _URL_PASSWORD.findall(value) if _is_findable(word))
    return secrets


@functools.lru_cache(maxsize=1024)
def _is_findable(value: str, given: bool = False) -> bool:
    """True where masking this value hides a secret, and not a number, a path or a word that means nothing."""
    value = value.strip()
    if _PLAIN.fullmatch(value) or not value.strip("*"):
        return False
    if given:
        return len(value) >= MIN_GIVEN_LENGTH
    return len(value) >= MIN_LENGTH and not _NUMBER.fullmatch(value) and not _is_path(value)


def _is_path(value: str) -> bool:
    """An absolute path whose first folder is there (a key in base64 may begin with a slash too)."""
    parts = Path(value).expanduser().parts
    return value.startswith(("/", "~")) and len(parts) > 1 and Path(*parts[:2]).exists() and "\n" not in value


def _secrets_of_data(text: str) -> set[str]:
    """The secrets in a text that is a mapping or a list, as JSON or as Python writes it."""
    for read in (json.loads, ast.literal_eval) if text[:1] in ("{", "[") else ():
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return secret_values({"": read(text)})
    return set()


def _is_told(value: Any) -> bool:
    """True where a value of a secret name tells something: not None, a switch or a small number."""
    if value is None or isinstance(value, bool):
        return False
    text = str(value)
    return not _PLAIN.fullmatch(text) and (isinstance(value, str) or len(text) >= MIN_LENGTH)


def _mask_value(name: str, value: Any, known: Collection[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _mask_value(str(key), part, known) for key, part in value.items()}
    if looks_secret(name) and _is_told(value):
        return MASK
    if isinstance(value, (list, tuple)):
        return [_mask_value("", part, known) for part in value]
    return mask(value, known) if isinstance(value, str) else value


@functools.lru_cache(maxsize=1024)
def _spellings(secret: str) -> tuple[str, ...]:
    """How a secret may stand in a text, longest first."""
    forms = {secret, secret.strip()}
    forms |= {line.strip() for line in secret.splitlines() if len(line.strip()) >= MIN_LINE_LENGTH}
    for form in list(forms):
        escaped = form.encode("unicode_escape").decode("ascii")
        forms |= {repr(form)[1:-1], escaped, escaped.replace('"', '\\"')}
        forms |= {json.dumps(form)[1:-1], json.dumps(form, ensure_ascii=False)[1:-1]}
        forms |= {html.escape(form), html.escape(form, quote=False), html.escape(form).replace("&#x27;", "&#39;")}
        forms |= {urllib.parse.quote(form), urllib.parse.quote(form, safe=""), urllib.parse.quote_plus(form)}
    return tuple(sorted(forms, key=len, reverse=True))


def _replace(text: str, secrets: Collection[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):  # a secret may be a part of a longer one
        for form in _spellings(secret):
            if form in text:
                text = text.replace(form, MASK)
    return text


def _begun(text: str, secrets: Collection[str]) -> int:
    """Length of the longest end of a text with which a secret may begin."""
    forms = [form for secret in secrets for form in _spellings(secret)]
    longest = min(len(text), max(map(len, forms), default=0))
    return next((n for n in range(longest, 0, -1) if any(form.startswith(text[-n:]) for form in forms)), 0)
