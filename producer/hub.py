"""Hugging Face datasets as text: a directory here, or a name on the hub, streamed.

A name on the hub is pinned to a commit before anything is read. Rows come in stored order and are read as
they are needed: nothing is downloaded that is not used, and nothing is kept on this machine.
"""

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.common.documents import Document
from penstock.common.errors import ConfigError, PenstockError, Unavailable, nearest
from penstock.common.settings import one_line

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"hf_\w+")
_SAVED = ("state.json", "dataset_dict.json")
"""What `save_to_disk` leaves in a directory."""
ANSWER_SECONDS = 10.0
"""How long the hub may take to say which commit a revision is."""


@dataclass(frozen=True)
class TableText:
    """Which rows of which dataset are documents.

    Attributes:
        name: a directory here, or `owner/name` on the hub.
        commit: of the hub's dataset; None for a directory.
        config, split: None takes the only or default one, and `train` or the first.
    """

    name: str
    column: str
    config: str | None = None
    split: str | None = None
    commit: str | None = None


def is_commit(revision: str | None) -> bool:
    """Whether a revision can only ever be one commit."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def find_commit(name: str, revision: str | None) -> str | None:
    """The commit that a hub dataset's revision (its newest by default) is now; None for a directory.

    Raises:
        ConfigError: it is neither a directory nor a dataset on the hub that may be read, or has no such
            revision.
        Unavailable: the hub does not answer.
    """
    if _is_directory(name):
        if revision is not None:
            raise ConfigError(f"corpus.revision: goes with a hub name, and {name} is a directory here")
        return None
    if not _HUB_NAME.fullmatch(name):
        raise ConfigError(
            f"corpus.dataset: {name} is not a directory; give a local dataset directory or a hub name "
            "(owner/name)"
        )
    if is_commit(revision):
        return revision
    import huggingface_hub

    with _in_one_line(name):
        info = huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=ANSWER_SECONDS)
    if info.sha is None:
        raise Unavailable(f"corpus.dataset: the hub does not say which commit {name} is at; try again")
    return info.sha


def dataset_documents(text: TableText) -> Generator[Document]:
    """The texts of a dataset in stored order, named row-<number>. Close it to stop reading.

    Raises:
        ConfigError: no such dataset, configuration, split or column, or the column does not hold text.
        Unavailable: the hub breaks off.
    """
    with _in_one_line(text.name):
        rows = iter(_table(text))
    number = 0
    while True:
        with _in_one_line(text.name, number):
            row = next(rows, None)
        if row is None:
            return
        if text.column not in row:
            hint = nearest(text.column, row)
            raise ConfigError(f"corpus.column: no column {text.column!r} in {text.name}.{hint}")
        value = row[text.column]
        if value is not None and not isinstance(value, str):
            kind = type(value).__name__
            raise ConfigError(f"corpus.column: {text.column!r} of {text.name} holds {kind} and not text")
        if value:
            yield Document(f"row-{number:09d}", value)
        number += 1


def _is_directory(name: str) -> bool:
    return Path(name).expanduser().is_dir()


def _table(text: TableText) -> Any:
    """What gives the rows: a table on this disk, or a stream."""
    import datasets

    path, config = text.name, text.config
    if text.commit is None:
        directory = Path(text.name).expanduser()
        path = str(directory)
        if not directory.is_dir():
            raise ConfigError(f"corpus.dataset: {text.name} is not a directory; it was one before")
        if any((directory / name).exists() for name in _SAVED):
            if config is not None:
                raise ConfigError(f"corpus.dataset_config: {text.name} is a saved dataset and has none")
            return _split(text, datasets.load_from_disk(path))
    return _split(text, datasets.load_dataset(path, config, revision=text.commit, streaming=True))


def _split(text: TableText, loaded: Any) -> Any:
    if not isinstance(loaded, dict):
        if text.split is not None:
            raise ConfigError(f"corpus.split: {text.name} is a single table and has no splits")
        return loaded
    split = text.split or ("train" if "train" in loaded else next(iter(loaded)))
    if split not in loaded:
        hint = nearest(split, loaded)
        raise ConfigError(
            f"corpus.split: no split {split!r} in {text.name}.{hint} It has {', '.join(loaded)}."
        )
    return loaded[split]


@contextmanager
def _in_one_line(name: str, row: int | None = None) -> Iterator[None]:
    """Errors of the libraries as one line that names a setting: they raise those of several HTTP clients.

    What a connection says in its own words is left out: it may hold signed addresses.
    """
    try:
        yield
    except PenstockError:
        raise
    except Exception as error:
        raise _told(name, row, error) from error


def _told(name: str, row: int | None, error: Exception) -> PenstockError:
    import datasets
    from huggingface_hub import errors

    links = list(_chain(error))
    here = _is_directory(name)
    # where nobody is logged in, the library tells of it in words alone
    words = (str(link) for link in links if isinstance(link, datasets.exceptions.DatasetNotFoundError))
    if any(isinstance(link, errors.GatedRepoError) for link in links) or any("gated" in w for w in words):
        return ConfigError(
            f"corpus.dataset: {name} is gated on the hub: accept its terms there, and set HF_TOKEN to a "
            "token of that account"
        )
    if any(isinstance(link, errors.RevisionNotFoundError) for link in links):
        return ConfigError(f"corpus.revision: {name} has no such revision on the hub; check it")
    missing = (errors.RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError)
    if not here and any(isinstance(link, missing) for link in links):
        return ConfigError(
            f"corpus.dataset: {name} is neither a directory here nor a dataset on the hub that may be read; "
            "check the name, and HF_TOKEN if it is private"
        )
    if isinstance(error, ValueError) and "config" in str(error).lower():
        return ConfigError(f"corpus.dataset_config: {name}: {_words(error)}")
    if here or isinstance(
        error, (ValueError, RuntimeError, FileNotFoundError, datasets.exceptions.DatasetsError)
    ):
        where = "" if row is None else f" after {row} rows"
        return ConfigError(f"corpus.dataset: {name} cannot be read as a dataset{where}: {_words(error)}")
    what = "cannot be reached for" if row is None else f"broke off after {row} rows of"
    return Unavailable(
        f"corpus.dataset: the hub {what} {name} ({type(error).__name__}); check the name, the network and "
        "HF_HUB_OFFLINE, and try again"
    )


def _words(error: Exception) -> str:
    return one_line(_TOKEN.sub("hf_…", str(error)), 300)


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
