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


def test_json_lines_say_who_speaks_and_of_what(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(json_lines=True)
    logs.tell_about(role="trainer", worker="trainer-1", run="run-1")
    LOGGER.info("one", extra={"chunk": 3, "rate": float("nan")})
    logs.tell_about(run=None)
    LOGGER.info("two")
    first, second = map(json.loads, lines(capsys))
    of_both = {"level": "info", "role": "trainer", "worker": "trainer-1"}
    assert {k: v for k, v in first.items() if k != "time"} == of_both | {
        "message": "one",
        "run": "run-1",
        "chunk": 3,
        "rate": "nan",
    }
    assert {k: v for k, v in second.items() if k != "time"} == of_both | {"message": "two"}


def test_libraries_are_heard_from_warnings_on_or_as_ours(capsys: pytest.CaptureFixture[str]) -> None:
    library = logging.getLogger("some.library")
    set_up_logging(level=logging.DEBUG)
    library.info("not heard")
    library.warning("heard")
    set_up_logging(level=logging.DEBUG, libraries=True)
    library.debug("heard, too")
    assert [line.split(" ", 1)[1] for line in lines(capsys)] == [
        "warning: some.library: heard",
        "debug: some.library: heard, too",
    ]


@pytest.mark.parametrize("as_json", [False, True])
def test_no_secret_is_logged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    secret = 'pass"word\\of redis'
    monkeypatch.setenv("PENSTOCK_REDIS_PASSWORD", secret)
    set_up_logging(json_lines=as_json, level=logging.DEBUG, libraries=True)
    logging.getLogger("botocore").debug("headers: %s", {"k": secret})
    LOGGER.warning("%s", secret, extra={"of": {"it": [secret]}, "odd": {secret}})
    try:
        raise ValueError(secret)
    except ValueError:
        LOGGER.exception("failed")
    said = capsys.readouterr().err
    assert "***" in said
    # neither as it is nor as JSON or Python write it
    assert "word" not in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("one\nerror: what is wrong\n", "what is wrong"),
        ('{"message": "first"}\n{"message": "what is wrong", "level": "error"}\n', "what is wrong"),
        ("Traceback\nValueError: x", "ValueError: x"),
        ("12", "12"),
        ("", "no output"),
    ],
)
def test_last_words(text: str, said: str) -> None:
    assert logs.last_words(text) == said


class Unspeakable:
    """Its representation fails, too."""

    def __repr__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize("json_lines", [False, True])
@pytest.mark.parametrize("told", [("%d", "a-secret-to-hide"), ("%s", Unspeakable())])
def test_a_message_that_cannot_be_told_tells_no_secret(
    json_lines: bool,
    told: tuple[str, object],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "a-secret-to-hide")
    set_up_logging(json_lines)
    LOGGER.info(*told)
    said = capsys.readouterr().err
    assert "a-secret-to-hide" not in said
    if told[0] == "%d":
        assert "cannot be told: '%d' ('***',)" in said
