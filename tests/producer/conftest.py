"""One Valkey server and one small corpus for the producer's tests."""

import os
from collections.abc import Iterator

import pytest

from penstock.common.redis import Client
from penstock.producer import work
from penstock.producer.corpus import CorpusSettings, ensure_corpus
from penstock.store.corpus import Corpus
from services.lm import shipped_tokenizer, write_text
from services.valkey import connected, valkey_server


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    with valkey_server() as server:
        yield connected(server)


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Some hundred sequences of 24 tokens."""
    directory = tmp_path_factory.mktemp("small")
    settings = CorpusSettings(
        url=str(directory / "corpus"),
        text="files",
        files=[write_text(directory / "text", documents=60)],
        context=24,
    )
    return ensure_corpus(settings, shipped_tokenizer(), lambda done, wanted: None)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that are right for days of work are short here, and no power is lost."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(work, "IDLE_SECONDS", 0.05)
