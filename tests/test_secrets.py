"""Secrets: what is registered is in no text that is written for somebody else to read."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import string
import traceback
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice import secrets
from apprentice.errors import ApprenticeError, ConfigError, LocalError, Problem
from apprentice.secrets import HIDDEN, Secrets, child_environment, scrub, scrub_error, scrub_values
from apprentice.settings.config import ProviderSettings, read_key, require_key


@pytest.fixture(autouse=True)
def own_register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a register of its own."""
    monkeypatch.setattr(secrets, "_process", Secrets())


printable = st.text(string.ascii_letters + string.digits + string.punctuation + " é漢", min_size=12, max_size=60)


@given(printable.map(str.strip).filter(lambda text: len(text) >= 12), st.text(max_size=20), st.text(max_size=20))
def test_a_registered_text_is_hidden_in_every_spelling(secret: str, before: str, after: str) -> None:
    """As it is, percent-encoded, in JSON, in a repr, as base64."""
    register = Secrets()
    register.register(f"{secret}\n")
    spellings = [secret, quote(secret), quote(secret, safe=""), quote_plus(secret), json.dumps(secret)[1:-1]]
    spellings += [repr(secret)[1:-1], base64.b64encode(secret.encode()).decode().rstrip("=")]
    for spelling in spellings:
        assert spelling not in register.scrub(f"{before}|{spelling}|{after}")


@given(st.text())
def test_without_secrets_texts_stay_as_they_are(text: str) -> None:
    """Save for what looks like a key."""
    if not any(sign in text for sign in ("sk", "pk-", "rk-", "key-", "AIza", "hf_", "ghp_", "xox")):
        assert Secrets().scrub(text) == text


def test_a_short_secret_does_not_blank_out_words() -> None:
    """A password that is a word is hidden where it stands alone."""
    register = Secrets()
    register.register("post")
    register.register("none")
    register.register("abc")
    assert (
        register.scrub("postgresql user=x password=post; none; abc")
        == f"postgresql user=x password={HIDDEN}; none; abc"
    )


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Incorrect API key provided: sk-proj-ab***************34yz.", "Incorrect API key provided: ***."),
        ("key sk-ant-api03-abcdef_0123-xyz is invalid", "key *** is invalid"),
        ("AIzaSyA1234567890", "***"),
        ("a key-value store, key-distribution, task-key, skeleton, sk", None),
    ],
)
def test_what_looks_like_a_key_is_hidden_unregistered(text: str, cleaned: str | None) -> None:
    """Vendors quote keys with stars in between; prose with hyphens is no key."""
    assert Secrets().scrub(text) == (cleaned or text)


@pytest.mark.parametrize(
    ("url", "whole", "hidden", "shown"),
    [
        ("postgresql://u:p%40ss-word@db.example/app", False, ["p%40ss-word", "p@ss-word"], ["db.example", "/app"]),
        ("postgresql://db/app?user=u&password=opensesame", False, ["opensesame"], ["user=u"]),
        ("https://m:hunter2hunter2@mlflow.example/", False, ["hunter2hunter2"], ["mlflow.example"]),
        ("https://x.example/v1?api-version=preview&token=t0k3nt0k3n", False, ["t0k3nt0k3n"], ["preview"]),
        (
            "https://hooks.example/services/T0/B0/abcdefghijkl",
            True,
            ["/services/T0/B0/abcdefghijkl", "abcdefghijkl"],
            [],
        ),
    ],
)
def test_of_a_url_the_secrets_are_hidden(url: str, whole: bool, hidden: list[str], shown: list[str]) -> None:
    """A password, a token; of a webhook's URL everything that opens it."""
    register = Secrets()
    register.register_url(url, whole=whole)
    text = register.scrub(f"cannot reach {url} ({url.partition('://')[2]}) {hidden}")
    assert not [secret for secret in hidden if secret in text]
    assert [part for part in shown if part not in text] == []


def test_errors_are_scrubbed_when_they_are_made() -> None:
    """Whoever raises need not think of it."""
    secrets.register("a-very-secret-key")
    errors = [
        ApprenticeError("header b'a-very-secret-key' is illegal"),
        LocalError("a-very-secret-key"),
        ConfigError("x.yaml", [Problem("remote", "is 'a-very-secret-key'")]),
    ]
    assert all("a-very-secret-key" not in str(e) + repr(e) for e in errors)


def test_an_errors_causes_are_scrubbed_in_place() -> None:
    """A traceback prints the whole chain."""
    key = "-".join(("a", "very", "secret", "key"))  # a traceback quotes lines of this file, too
    secrets.register(key)

    def fail() -> None:
        try:
            try:
                raise ValueError(b"Illegal header value: %s" % key.encode())
            except ValueError as error:
                raise OSError(5, key) from error
        except OSError:
            raise RuntimeError(key)  # noqa: B904  # its context must be cleaned too

    with pytest.raises(RuntimeError) as raised:
        fail()
    assert key not in "".join(traceback.format_exception(scrub_error(raised.value)))


def test_values_are_scrubbed_at_every_depth() -> None:
    """And become JSON, whatever they were."""
    secrets.register("a-very-secret-key")
    value = {
        "a": ["a-very-secret-key", {"a-very-secret-key": 1}],
        "b": ValueError("a-very-secret-key"),
        "c": (1.5, None),
    }
    assert scrub_values(value) == {"a": [HIDDEN, {HIDDEN: 1}], "b": HIDDEN, "c": [1.5, None]}


def test_log_lines_and_their_tracebacks_are_scrubbed() -> None:
    """In the message, in an argument, in an exception."""
    key = "-".join(("a", "very", "secret", "key"))
    secrets.register(key)
    stream = io.StringIO()
    log = secrets.logger("apprentice.test_secrets")
    handler = logging.StreamHandler(stream)
    log.addHandler(handler)
    try:
        try:
            raise ValueError(key)
        except ValueError:
            log.warning(f"{key} %s %d", key, 7, exc_info=True)
    finally:
        log.removeHandler(handler)
    assert key not in stream.getvalue()
    assert f"{HIDDEN} {HIDDEN} 7\nTraceback" in stream.getvalue()


def test_a_child_process_gets_no_secret() -> None:
    """Neither by value nor by name; what it needs can be kept."""
    secrets.register("a-very-secret-key")
    environ = {
        "PATH": "/bin",
        "X": "Bearer a-very-secret-key",
        "OPENAI_API_KEY": "k",
        "HF_TOKEN": "t",
        "PGPASSWORD": "p",
    }
    assert child_environment(environ, keep=["HF_TOKEN"]) == {"PATH": "/bin", "HF_TOKEN": "t"}


@pytest.mark.parametrize("padding", ["{}\n", " {}", "\t{}\r\n", "{}"])
def test_white_space_round_a_key_is_taken_off(padding: str) -> None:
    """As `echo`, files read whole and CRLF leave it."""
    provider = ProviderSettings(provider="openai", model="m", api_key_env="THE_KEY")
    environ = {"THE_KEY": padding.format("some-opaque-key-value")}
    assert require_key(provider, environ) == "some-opaque-key-value"
    assert "some-opaque-key-value" not in scrub(f"Bearer {environ['THE_KEY']}")


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("some-opaque key-value", "white space"),
        ("some-opaque\nkey-value", "white space"),
        ('"some-opaque-key-value"', "quotes"),
        ("“some-opaque-key-value”", "not ASCII"),
        ("some-opaque\x00key-value", "control character"),
        (" \n", "not set"),
    ],
)
def test_a_key_that_cannot_be_sent_is_a_config_error(value: str, fault: str) -> None:
    """The error names the variable and the fault, and never the value."""
    with pytest.raises(ConfigError, match=fault) as raised:
        read_key("THE_KEY", {"THE_KEY": value}, "remote.api_key_env")
    assert "THE_KEY" in str(raised.value)
    assert "opaque" not in str(raised.value)


@pytest.mark.parametrize("name", ["sk-live-0123456789", "AIzaSyB0123456789abcdef", "deadbeefdeadbeef", "my key"])
def test_a_key_in_the_place_of_a_variables_name_is_not_quoted(name: str) -> None:
    """api_key_env takes a name; whoever writes the key there must not find it in a log."""
    provider = ProviderSettings(provider="openai", model="m", api_key_env=name)
    with pytest.raises(ConfigError, match="variable's name") as raised:
        require_key(provider, {})
    assert name not in str(raised.value)


def test_every_module_logs_by_a_logger_that_scrubs() -> None:
    """Ours are made by `secrets.logger`; Python's own are asked for only to quiet those of others."""
    root = Path(__file__).parent.parent
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for room in ("apprentice", "flows", "serving")
        for path in sorted((root / room).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"getLogger\((__name__|[\"']apprentice)|logging\.(warning|info|error|exception|critical)\(", line)
    ]
    assert found == []
