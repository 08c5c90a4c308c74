"""The command line as a user calls it: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

COMMAND = [sys.executable, "-m", "penstock.deploy.cli"]

SMALL_SAES: list[dict[str, Any]] = [
    {
        "name": "resid-topk",
        "architecture": "topk",
        "hook_name": "blocks.1.hook_resid_post",
        "d_sae": 256,
        "k": 16,
        "dead_after_rows": 4000,
    },
    {
        "name": "mlp-l1",
        "architecture": "standard",
        "hook_name": "blocks.0.mlp.hook_post",
        "d_sae": 128,
        "l1_coefficient": 1.0,
        "dead_after_rows": 4000,
    },
]


def small_config(workdir: Path, **changes: Any) -> dict[str, Any]:
    """A whole experiment that takes seconds: 16 chunks of about 2,000 rows, two SAEs."""
    config: dict[str, Any] = {
        "workdir": str(workdir),
        "corpus": {"max_tokens": 34_000, "max_held_out_tokens": 5_000, "context": 128},
        "dataset": {
            "hooks": ["blocks.1.hook_resid_post", "blocks.0.mlp.hook_post"],
            "sequences_per_chunk": 16,
            "max_rows": 31_000,
        },
        "producers": 1,
        "trainers": 1,
        "runs": [
            {
                "name": "small",
                "strict": True,
                "batch_rows": 256,
                "window_chunks": 2,
                "head_interval": 1,
                "saes": SMALL_SAES,
            }
        ],
        "evaluation": {"sequences": 8},
        # short, so that a killed worker's claims return soon
        "redis": {"lease_seconds": 3.0},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = config
        for parent in parents:
            target = target[parent]
        target[last] = value
    return config


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


def penstock(
    *arguments: str | Path, env: dict[str, str] | None = None, timeout: float = 240
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {}),
        check=False,
    )


def called(*arguments: str) -> int:
    """Run a command in this process; its exit code."""
    from penstock.deploy.cli import main

    try:
        main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def start(*arguments: str | Path, env: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    """Start a command; the caller ends it."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {}),
    )


def assert_one_clear_line(result: "subprocess.CompletedProcess[str]", *words: str) -> None:
    """Exit code 2, one line that says what is wrong, no traceback."""
    lines = [line for line in result.stderr.strip().splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"
