"""Keeps secrets out of what is said: logs, errors, tracebacks, status.

Two nets. What is known to be secret (passwords, keys and tokens of the environment and of URLs) is hidden
wherever it stands, percent-encoded or escaped too. What looks like a secret is hidden by its form: passwords
in URLs, `token=…`, authorization headers, access keys.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"
SHORTEST = 6
"""Characters. A shorter secret is hidden by its form only: its letters stand in too many other words."""

_SECRET_NAMES = re.compile(
    r"(PASSWORD|PASSWD|SECRET|TOKEN|ACCESS_KEY|ACCESS_KEY_ID|API_KEY|AUTH)$", re.IGNORECASE
)
_IN_URL = re.compile(r"//(?:[^:/@\s]*:)?([^\s]*)@")
"""What stands before the last @: a password may hold a slash."""
_NAMES = (
    r"(?:[a-z0-9_.-]*[_.-])?(?:password|passwd|secret|token|api[_-]?key|access[_-]?key(?:[_-]?id)?|accesskeyid|sig|"
    r"signature|credential|authorization|secret[_-]?(?:access[_-]?)?key|session[_-]?token|identity[_-]?token|"
    r"webidentitytoken|accesstoken|refreshtoken|clientsecret|accountkey)"
)
_HEADERS = r"(?:proxy-authorization|authorization|x-amz-security-token|x-api-key|cookie|set-cookie)"
_FORMS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(//[^/\s:@'\"]*:)[^/\s@'\"]+@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(https?://)[^/\s:@'\"]+@", re.IGNORECASE), rf"\1{HIDDEN}@"),
    (re.compile(rf"(['\"]{_HEADERS}['\"][:,] b?['\"])[^'\"]*", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(rf"(\b{_HEADERS}: ?)[^\r\n'\"\\]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    # what hands out credentials for a while answers in XML or JSON
    (
        re.compile(r"(<[\w:.-]*(?:password|secret\w*|token|accesskeyid)>)[^<]+", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
    (re.compile(rf"(\b{_NAMES}=)(?!\*)[^\s&'\",;)}}\]\\]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(rf"(['\"]{_NAMES}['\"] ?: ?b?['\"])[^'\"]*", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(rf"(\b{_NAMES}=b?['\"])[^'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(\bbearer )[^\s'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), HIDDEN),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), HIDDEN),
)

_known: set[str] = set()


def hide(secret: str | None) -> None:
    """From now on, never say this."""
    if secret is None or len(secret) < SHORTEST:
        return
    _known.update(
        form
        for form in (
            secret,
            unquote(secret),
            quote(secret),
            quote(secret, safe=""),
            quote_plus(secret),
            json.dumps(secret)[1:-1],
            repr(secret)[1:-1],
        )
        if len(form) >= SHORTEST
    )


def hide_in_url(url: str | None) -> None:
    """From now on, never say what a URL carries before its @, or as a password or token."""
    if not url:
        return
    found = _IN_URL.search(url)
    if found:
        hide(found[1])
    for value in re.findall(rf"[?&]{_NAMES}=([^&#\s]*)", url, re.IGNORECASE):
        hide(value)


def hide_environment(environment: Mapping[str, str] = os.environ) -> None:
    """From now on, never say what the environment holds as a secret."""
    for name, value in environment.items():
        if _SECRET_NAMES.search(name):
            hide(value)
        elif "://" in value:
            hide_in_url(value)


def redact(text: str, known: Iterable[str] | None = None) -> str:
    """Text without secrets. Bounded work: a few passes over it."""
    # long ones first: a secret may be the beginning of another one
    for secret in sorted(_known if known is None else known, key=len, reverse=True):
        if secret in text:
            text = text.replace(secret, HIDDEN)
    for form, instead in _FORMS:
        text = form.sub(instead, text)
    return text


def public_url(url: str) -> str:
    """A URL without what stands before its @ and without password and token, for files that stay."""
    return re.sub(rf"[?&]{_NAMES}=[^&#\s]*", "", re.sub(r"//.*@", "//", url), flags=re.IGNORECASE)
