"""Secrets: which names look like one, and that no spelling of a value gets through."""

from __future__ import annotations

import html
import io
import json
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

from biokit.secrets import (
    MASK,
    looks_secret,
    mask,
    mask_file,
    mask_values,
    mask_words,
    masked_stream,
    secret_values,
)

TOKEN = "hf_QwErTy123456"
SECRET = [
    "HF_TOKEN", "hf_token", "WANDB_API_KEY", "apiKey", "accessToken", "AWS_SECRET_ACCESS_KEY", "GHTOKEN", "MYSQL_PWD",
    "PGPASSWORD", "DB_PASS", "BASIC_AUTH", "credentials", "passwd", "--api-key", "wandb.api_key", "HF_TOKEN_2",
    "TOKEN_GITHUB", "clientSecret", "SSH_KEY", "BIOKIT_WITH_hf_token", "GITHUB_PAT", "gh_pat", "SSHPASS", "api_tokens",
]  # fmt: skip
PLAIN = [
    "PYTHONHASHSEED", "PWD", "OLDPWD", "pad_token", "bos_token_id", "mask_token", "TOKENIZERS_PARALLELISM",
    "num_tokens", "tokens_per_s", "tokenizer", "GIT_AUTHOR_NAME", "SSH_AUTH_SOCK", "KEYBOARD_LAYOUT", "token_accuracy",
    "KEY_FILE", "keys", "bypass", "AUTH_METHOD", "lr", "", "pat", "PATIENCE", "max_tokens", "train_tokens",
    "smarts_pat",
]  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.mark.parametrize("name", SECRET)
def test_names_that_look_secret(name: str) -> None:
    assert looks_secret(name)


@pytest.mark.parametrize("name", PLAIN)
def test_names_that_do_not(name: str) -> None:
    assert not looks_secret(name)


def test_values_of_the_environment_are_masked() -> None:
    assert mask(f"a {TOKEN}, b{TOKEN}c") == f"a {MASK}, b{MASK}c"


@pytest.mark.parametrize(
    "value", ["abc", "12345678", "1e-3", "true", "offline", "/usr/share/doc/keys", "~/.ssh/id_rsa", "", "***"]
)
def test_numbers_paths_and_plain_words_are_not_secrets(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", value)
    text = f"x {value} y 12345678"
    assert mask(text) == text


def test_a_key_in_base64_that_begins_like_a_path_is_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/K7MDENG/bPxRfiCYKEY")
    assert mask("key /K7MDENG/bPxRfiCYKEY.") == f"key {MASK}."


def test_passwords_in_urls_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://anna:pa55-w0rd@proxy:3128")
    assert mask("http://anna:pa55-w0rd@proxy:3128") == f"http://anna:{MASK}@proxy:3128"


def test_words_that_hold_more_than_a_value_are_masked() -> None:
    conf = '{"hub": {"hf_token": "hf_0123456"}, "keys": [{"api_key": "k-98765"}], "lr": 1}'
    words = [
        "train.py",
        "--conf",
        conf,
        f"--conf={conf}",
        "--url",
        "https://anna:pa55word@host/x",
        "db=pg://u:s3cr3t@h",
    ]
    masked = conf.replace("hf_0123456", MASK).replace("k-98765", MASK)
    assert mask_words(words) == [
        "train.py", "--conf", masked, f"--conf={masked}", "--url", f"https://anna:{MASK}@host/x", f"db=pg://u:{MASK}@h"
    ]  # fmt: skip
    for text in (
        '{"hf_token": "hf_0123abc="}',
        '{"url": "https://h/x?a=1", "hf_token": "hf_0123abc="}',
        "{'hf_token': 'hf_0123abc='}",
        'conf=[{"hf_token": "hf_0123abc="}]',
    ):
        assert mask_words([text]) == [text.replace("hf_0123abc=", MASK)]
    assert mask_values({"url": "https://anna:pa55word@host"}) == {"url": f"https://anna:{MASK}@host"}


def test_every_spelling_is_found() -> None:
    odd = "p\"a\\s's<&>wörd/ +\t"
    spelled = [
        odd, repr(odd), json.dumps(odd), json.dumps(odd, ensure_ascii=False), html.escape(odd),
        urllib.parse.quote(odd), urllib.parse.quote_plus(odd), json.dumps({"x": [odd]}),
    ]  # fmt: skip
    for text in spelled:
        assert "rd" not in mask(text, [odd]), text


def test_lines_of_a_secret_of_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_PRIVATE_KEY", "-----BEGIN-----\nMIIEpAIBAAKCAQEA1\nqwerty\n-----END-----")
    assert mask("[rank 0] MIIEpAIBAAKCAQEA1") == f"[rank 0] {MASK}"


def test_a_secret_that_contains_another_is_masked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONG_TOKEN", f"{TOKEN}-and-more")
    assert mask(f"{TOKEN}-and-more {TOKEN}") == f"{MASK} {MASK}"


def test_parameters() -> None:
    values = {"hf_token": "x1", "lr": 1e-3, "note": f"uses {TOKEN}", "pad_token": "<pad>", "password": 123456, "db": {}}
    values["db"] = {"password": "pa55word", "hosts": [f"{TOKEN}@a", "pa55word"]}
    assert mask_values(values) == {
        "hf_token": MASK, "lr": 1e-3, "note": f"uses {MASK}", "pad_token": "<pad>", "password": MASK,
        "db": {"password": MASK, "hosts": [f"{MASK}@a", MASK]},
    }  # fmt: skip
    assert secret_values(values) == {"x1", "123456", "pa55word"}
    assert mask_values({"use_auth": True, "hf_token": None, "key": ""}) == {
        "use_auth": True,
        "hf_token": None,
        "key": "",
    }


def test_command_lines() -> None:
    words = ["x.py", "--api-key", "a b", "--token=t1", "hf_token=t2", "-p", "hf_token", "t3", "--lr", "1e-3", TOKEN]
    masked = ["x.py", "--api-key", MASK, f"--token={MASK}", f"hf_token={MASK}", "-p", "hf_token", MASK, "--lr", "1e-3"]
    assert mask_words(words) == [*masked, MASK]
    assert mask_words(["--token", "--lr", "1", "--pad-token", "<pad>"]) == [
        "--token",
        "--lr",
        "1",
        "--pad-token",
        "<pad>",
    ]


def test_a_file_is_masked_in_place(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\xff " + TOKEN.encode())
    assert mask_file(path) and path.read_bytes() == b"\xff ***"
    assert not mask_file(path)


def test_a_stream_passes_whole_lines_on_at_once() -> None:
    below = io.StringIO()
    stream = masked_stream(below)
    stream.write("a ")
    assert below.getvalue() == ""
    stream.write("b\nc")
    assert below.getvalue() == "a b\n"
    stream.flush()
    assert below.getvalue() == "a b\nc"
    stream.write("\r 10%")
    assert below.getvalue() == "a b\nc\r"


def test_a_secret_in_pieces_does_not_get_through_a_stream() -> None:
    below = io.StringIO()
    stream = masked_stream(below)
    for piece in (TOKEN[:3], TOKEN[3:9], TOKEN[9:], " end"):
        stream.write(piece)
        stream.flush()
        assert TOKEN[:3] not in below.getvalue()
    assert below.getvalue() == f"{MASK} end"
    stream.write(TOKEN[:5])
    stream.close()
    assert below.getvalue() == f"{MASK} end{TOKEN[:5]}"


def test_a_stream_remembers_what_the_environment_had(monkeypatch: pytest.MonkeyPatch) -> None:
    below = io.StringIO()
    stream = masked_stream(below)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("NEW_TOKEN", "later-value")
    print(TOKEN, "later-value", file=stream)
    assert below.getvalue() == f"{MASK} {MASK}\n"


def test_a_stream_stands_for_a_real_one(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="utf-8") as below:
        stream = masked_stream(below)
        assert stream.fileno() == below.fileno() and stream.encoding == "utf-8" and not stream.isatty()
        stream.buffer.write(f"{TOKEN} é\n".encode())
        stream.writelines(["x\n", "y\n"])
        stream.write("z" * 100_000)  # a line without an end is not kept for ever
    assert (tmp_path / "out").read_text(encoding="utf-8")[:10] == "*** é\nx\ny\n"
    assert len((tmp_path / "out").read_text(encoding="utf-8")) > 100_000


def test_lines_of_threads_do_not_mix() -> None:
    below = io.StringIO()
    stream = masked_stream(below)

    def work(name: str) -> None:
        for _ in range(200):
            print(name, TOKEN, name, file=stream)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(below.getvalue().splitlines())) == [f"{name} {MASK} {name}" for name in "abcd"]


def test_it_costs_no_torch() -> None:
    import subprocess

    code = "import biokit.secrets, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
