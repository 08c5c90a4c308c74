"""Headless Chromium, from Debian's package."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def open_page(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's DOM once loaded, and what its console said.

    Skips where there is no browser; under CI that is a failure.
    """
    browser = shutil.which("chromium")
    if browser is None:
        reason = "no chromium: tests/services/install brings it"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        # nobody is found: whatever a page asks of a network becomes a complaint
        "--host-resolver-rules=MAP * ~NOTFOUND",
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--enable-logging=stderr", "--v=0", f"--user-data-dir={profile}", "--dump-dom"),
    ]
    done = subprocess.run(
        [browser, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
