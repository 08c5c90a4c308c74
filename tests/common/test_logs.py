"""One line per event, plain or JSON."""

import json
import logging
from collections.abc import Iterator

import pytest

from penstock.common import logs
from penstock.common.logs import LOGGER, set_up_logging


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, propagate = LOGGER.handlers, LOGGER.level, LOGGER.propagate
    of_root = list(root.handlers), root.level
    monkeypatch.setattr(logs, "_about", {})
    yield
    LOGGER.handlers, LOGGER.propagate = handlers, propagate
    LOGGER.setLevel(level)
    root.handlers[:] = of_root[0]
    root.setLevel(of_root[1])


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == "", "standard output is for results"
    return captured.err.splitlines()


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    LOGGER.info("chunk %d", 3, extra={"rows": 7, "url": "a b"})
    LOGGER.warning("slow")
    LOGGER.debug("not shown")
    first, second = lines(capsys)
    assert first.split(" ", 1)[1] == "chunk 3  rows=7 url=a b"
    assert second.split(" ", 1)[1] == "warning: slow"


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(json_lines=True, level=logging.DEBUG)
    LOGGER.info('quoted "%s"\nand broken', "x", extra={"rows": 7, "odd": {1}})
    LOGGER.debug("shown")
    first, second = map(json.loads, lines(capsys))
    assert first.pop("time") > 0
    assert first == {"level": "info", "message": 'quoted "x"\nand broken', "rows": 7, "odd": "{1}"}
    assert second["level"] == "debug"


def test_an_exception_is_logged_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (False, True):
        set_up_logging(json_lines=as_json)
        try:
            raise ValueError("the cause")
        except ValueError:
            LOGGER.exception("failed")
        assert "the cause" in "\n".join(lines(capsys))


def test_setting_up_twice_does_not_double_lines(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    set_up_logging()
    LOGGER.info("once")
    assert len(lines(capsys)) == 1
