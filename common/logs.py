"""Logging: one line per event, plain or JSON, to standard error, without secrets."""

import contextlib
import json
import logging
import math
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any

from penstock.common.redact import hide_environment, redact

LOGGER = logging.getLogger("penstock")

LEVELS = ("debug", "info", "warning", "error")

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_about: dict[str, object] = {}


def tell_about(**fields: object) -> None:
    """Fields that every JSON line of this process carries from now on: role, worker, run. None ends one."""
    _about.update(fields)
    for name in [name for name, value in _about.items() if value is None]:
        del _about[name]


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = " ".join(f"{k}={v}" for k, v in _extra(record).items())
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        whose = "" if _is_ours(record) else f"{record.name}: "
        line = f"{clock} {level}{whose}{record.getMessage()}{'  ' + fields if fields else ''}"
        return redact(f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **_about,
        }
        if not _is_ours(record):
            entry["logger"] = record.name
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(_clean(entry | _extra(record)), default=lambda value: redact(str(value)))


def _clean(value: Any) -> Any:
    """Without secrets, and without numbers that JSON does not know."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {redact(str(k)): _clean(v) for k, v in value.items()}
    return [_clean(v) for v in value] if isinstance(value, (list, tuple)) else value


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {k: v for k, v in vars(record).items() if k not in _STANDARD}


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.split(".")[0] == LOGGER.name


class _Stderr(logging.Handler):
    """Writes to what is standard error now, not to what it was when logging was set up."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # a message must not end the process; logging's own complaint hides no secrets
            trace = traceback.format_exc()
            with contextlib.suppress(Exception):
                what = f"a log message of {record.name} cannot be told: {record.msg!r} {record.args!r}"
                print(redact(f"{what}\n{trace}"), file=sys.stderr, flush=True)


_handler = _Stderr()


def set_up_logging(json_lines: bool = False, level: int = logging.INFO, libraries: bool = False) -> None:
    """Send the log to standard error; fields given as `extra` follow the message.

    Args:
        libraries: log what libraries say from the same level on; otherwise from warnings on.
    """
    hide_environment()
    _handler.setFormatter(_Json() if json_lines else _Plain())
    LOGGER.handlers = [_handler]
    LOGGER.setLevel(level)
    LOGGER.propagate = False
    root = logging.getLogger()
    if _handler not in root.handlers:
        root.addHandler(_handler)
    root.setLevel(level if libraries else max(level, logging.WARNING))


def log_what_is_not_caught() -> None:
    """Send what ends the process or a thread, and warnings, through the log: there, secrets are hidden."""

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
            return
        LOGGER.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))

    def uncaught_in_thread(found: threading.ExceptHookArgs) -> None:
        if found.exc_value is not None and not isinstance(found.exc_value, SystemExit):
            uncaught(found.exc_type, found.exc_value, found.exc_traceback)

    sys.excepthook = uncaught
    threading.excepthook = uncaught_in_thread
    logging.captureWarnings(True)


def last_words(text: str) -> str:
    """The message of the last line of a log, plain or JSON, without the word 'error:'."""
    line = (text.strip().splitlines() or ["no output"])[-1]
    try:
        entry = json.loads(line)
    except ValueError:
        return line.removeprefix("error: ")
    return str(entry["message"]) if isinstance(entry, dict) and "message" in entry else line


def logs_json() -> bool:
    """Whether lines are JSON."""
    return isinstance(_handler.formatter, _Json)
