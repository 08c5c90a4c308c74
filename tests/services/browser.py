"""Headless Chromium, from Debian's package."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSERS_OWN = re.compile(
    r"https?://([\w-]+\.)*(google\.com|gvt1\.com|(update|safebrowsing)\.googleapis\.com)[/:]"
)
"""What the browser asks for by itself."""


def open_page(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's DOM once loaded; what its console said, and what it asked a network for.

    Skips where there is no browser; under CI that is a failure.
    """
    browser = shutil.which("chromium")
    if browser is None:
        reason = "no chromium: tests/services/install brings it"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    log = profile.with_suffix(".requests")
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--enable-logging=stderr", "--v=0", f"--user-data-dir={profile}", "--dump-dom"),
    ]
    done = subprocess.run(
        [browser, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, said + _asked_for(log)


def _asked_for(log: Path) -> list[str]:
    """Addresses that a page asked for; the log may end in the middle of a line."""
    events = log.read_text(encoding="utf-8").partition('"events"')[2]
    addresses = dict.fromkeys(re.findall(r'"url":"(https?:[^"]*)"', events))
    return [url for url in addresses if not BROWSERS_OWN.match(url)]
