"""Thousands of spoilt inputs: each is refused in one line or taken for what it says; nothing else happens.

Configuration files and stored records of every kind are changed at random, always the same way: as text
and bytes, and by meaning (a field gone, retyped, absurd), then under a valid checksum.
"""

import copy
import dataclasses
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from penstock.common.errors import (
    ConfigError,
    DamagedObject,
    DataError,
    ObjectMissing,
    PenstockError,
    UserError,
)
from penstock.deploy.cli import main
from penstock.deploy.config import load_config
from penstock.store import corpus as corpus_module
from penstock.store.commits import read_commit
from penstock.store.corpus import PackedText, open_corpus, write_corpus
from penstock.store.dataset import Dataset
from penstock.store.heads import chain, newest_head, read_head
from penstock.store.joined import JoinedDataset
from penstock.store.layout import commit_key, floor_key
from penstock.store.local import LocalStore
from penstock.store.manifest import load_manifest
from penstock.store.objects import ObjectStore
from penstock.store.records import decode_record, encode_record
from penstock.store.retention import Reader, newest_floor, read_reader, register_reader
from penstock.trainer.config import load_run_config, open_pinned, submit_run
from penstock.trainer.lineage import load_checkpoint, load_history, take_over
from services.command import small_config
from services.runs import run_settings
from services.synthetic import make_manifest, write_dataset

ROOT = Path(__file__).parent.parent

Changed = Any
Place = tuple[Any, Any]
"""A container, and the key or index of something in it."""

ABSURD: list[Any] = [
    *(None, True, False, 0, 1, -1, -(10**6), 2**31, 2**63, 10**30, 10**400, 0.0, -0.0, 1.5, 1e308),
    *(
        "",
        " ",
        "a",
        "a\nb",
        "a\r\nerror: b",
        "\0",
        "é中😀",
        "\ud800",
        "x" * 20_000,
        "nan",
        "-1",
        "1e999",
        "on",
    ),
    *("../../x", "/", "ftp://x/y", "//", "s3://", "file://", "%s{0}", "\x1b[31m", "\u2028"),
    *([], {}, [None], [[]], {"": None}, {"a\nb": 1}, {"\ud800": 1}, [1, "a", None], {"name": {"name": {}}}),
    *([0] * 3000, {str(n): n for n in range(300)}, [[[[[[[[[[1]]]]]]]]]]),
]
UNREADABLE = [math.nan, math.inf, -math.inf]
"""What YAML has and records have not."""


# Changing


def places(data: Any) -> list[Place]:
    """Every value inside a document, by where it hangs."""
    found: list[Place] = []
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in list(inside)[:50]:
        found += [(data, key), *places(value)]
    return found


def change(rng: random.Random, document: Changed, absurd: list[Any]) -> str:
    """Change one thing in a document, in place; returns the name of the outermost field it lies in."""
    if not document:  # nothing is left to change
        document["x"] = None
    outermost = rng.choice(list(document))
    inner = places(document.get(outermost))
    at, key = rng.choice(inner) if inner and rng.random() < 0.7 else (document, outermost)
    match rng.randrange(7):
        case 0:
            del at[key]
        case 1 if isinstance(at, dict):
            at[rng.choice([f"{key}s", f"{key}"[1:], "x\ny", "\ud800", "", f"{key}" * 400])] = at.pop(key)
        case 2 if isinstance(at, dict):
            at[rng.choice(["x", "a\nb", "\udfff", "", "__class__", "crc32", "name"])] = rng.choice(absurd)
        case 3:
            at[key] = rng.choice([[at[key]], {"a": at[key]}, str(at[key]), [at[key]] * 3])
        case 4:
            _, donor = rng.choice(places(document)), rng.choice(places(document))
            at[key] = copy.deepcopy(donor[0][donor[1]])
        case 5 if isinstance(at, list):
            at.insert(rng.randrange(len(at) + 1), rng.choice(absurd))
        case _:
            at[key] = copy.deepcopy(rng.choice(absurd))
    return str(outermost)


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """One fault as disks, networks and editors make them."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    match rng.randrange(8):
        case 0:
            bit = rng.randrange(len(data) * 8)
            return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]
        case 1:
            return data[:a]
        case 2:
            return data[:a] + rng.randbytes(rng.randrange(1, 20)) + data[a:]
        case 3:
            return data[:a] + data[b:]
        case 4:
            return data[:b] + data[a:b] + data[b:]
        case 5:
            return data[b:] + data[:b]
        case 6:
            return data[:a] + bytes(b - a) + data[b:]
        case _:
            return (
                data[:a]
                + bytes(rng.choice(b'0123456789"{}[]:,.-eE \n\\') for _ in data[a : a + 3])
                + data[a + 3 :]
            )


def one_line(error: PenstockError) -> None:
    message = str(error)
    assert message
    assert message.isprintable(), ascii(message)
    assert len(message) < 1000


# Configuration files

SNIPPETS = [
    *("!!python/object/apply:os._exit [3]", "!!python/name:os.system", "!!int ''", "!!int x", "!!float ''"),
    *(
        "!!bool maybe",
        "!!timestamp never",
        "!!binary '%%'",
        "!!null x",
        "2001-99-99",
        "!!set {a}",
        "!!omap [a]",
    ),
    *("!!pairs [a: 1]", "!!map x", "!!seq x", "!!str [a]", "!unknown x", "*nothing", "&a [*a]", "{<<: *a}"),
    *(
        "&b {<<: *b}",
        "&c {c: *c}",
        "? [a]\n: b",
        "? {a: b}\n: c",
        "<<: 3",
        "<<: [3]",
        "\t",
        "- x",
        "'",
        '"',
        "{",
    ),
    *(
        "]",
        "%YAML 9.9",
        "---",
        "...",
        "|",
        ">-",
        "@",
        "`",
        "\u2028",
        "\ufeff",
        "\x85",
        "\x07",
        "0x" + "f" * 5000,
    ),
    *(
        "9" * 5000,
        "1:99:99",
        "0o8",
        "0b2",
        ".inf",
        "-.inf",
        ".nan",
        "1e999",
        "~",
        "null",
        "[" * 600,
        "{a: " * 600,
    ),
    *(
        '"\\ud800"',
        '"\\x00"',
        '"\\N"',
        "=",
        "a: b: c",
        "#",
        "&d",
        "*",
        "!!",
        "! x",
        "!<tag:yaml.org,2002:int> ''",
    ),
]


def bomb(depth: int) -> str:
    """Nine aliases of nine aliases of …: one line that stands for 9^depth values."""
    values = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for n in range(1, depth):
        values.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]")
    return "{" + ", ".join(values) + "}"


def config_documents(directory: Path) -> list[dict[str, Any]]:
    demo = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text())
    return [demo, small_config(directory / "work")]


def config_error(path: Path) -> ConfigError | None:
    """What is wrong with a file, if anything is."""
    try:
        load_config(str(path))
    except ConfigError as caught:
        error = caught
    else:
        return None
    one_line(error)
    assert str(error).startswith(str(path))
    return error


def command(path: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """`penstock config`; its exit code."""
    code: Any = 0
    try:
        main(["config", str(path)])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    if code:
        assert code == 2
        assert said.err.startswith("error: ")
        assert len(said.err.splitlines()) == 1
    else:
        assert said.out == f"{path}: fine\n"
    return int(code)


def look(path: Path, number: int, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether a file is taken; the command line must say the same."""
    error = config_error(path)
    if number % 5 == 0:
        assert command(path, capsys) == (0 if error is None else 2)
    return error is None


def test_unspoilt_configs_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, document in enumerate(config_documents(tmp_path)):
        for name, text in (("c.yaml", yaml.safe_dump(document)), ("c.json", json.dumps(document))):
            (tmp_path / name).write_text(text)
            assert look(tmp_path / name, 5 * number, capsys)


def test_every_setting_takes_every_absurdity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(small_config(tmp_path)))
    filled_in = load_config(str(path)).model_dump(mode="json")
    taken = cases = 0
    for at, key in places(filled_in):
        before = at[key]
        for value in ABSURD + UNREADABLE:
            at[key] = value
            path.write_text(json.dumps(filled_in))
            at[key] = before
            cases += 1
            taken += look(path, 1 if cases % 50 else 5, capsys)
    assert cases > 3000
    assert taken < cases / 2


@pytest.mark.parametrize(
    ("key", "shown"), [("\x1b[31mx", r"\x1b[31mx"), ("a\nb\u2028c", "a b c"), ("\0", r"\x00")]
)
def test_what_a_file_says_steers_no_terminal(tmp_path: Path, key: str, shown: str) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"dataset": {"hooks": ["x"]}, key: 1}))
    assert f"c.json: {shown}: unknown setting" in str(config_error(tmp_path / "c.json"))


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e999"])
def test_a_number_that_is_none_is_refused(tmp_path: Path, number: str) -> None:
    (tmp_path / "c.yaml").write_text(f"dataset: {{hooks: [x]}}\nredis: {{lease_seconds: {number}}}\n")
    assert "redis.lease_seconds: " in str(config_error(tmp_path / "c.yaml"))


@pytest.mark.parametrize("field", ["workdir", "runs_url", "corpus.url", "dataset.url"])
def test_the_home_of_a_stranger(tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str) -> None:
    document: dict[str, Any] = {"dataset": {"hooks": ["x"]}, "corpus": {}}
    *parents, last = field.split(".")
    at = document[parents[0]] if parents else document
    at[last] = "~nobody-here/x"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(document))
    error = config_error(tmp_path / "c.yaml")
    assert error is not None
    assert f"{field}: " in str(error)
    assert command(tmp_path / "c.yaml", capsys) == 2


@pytest.mark.parametrize(("kind", "cases"), [("json", 1000), ("yaml", 200)])
def test_configs_changed_by_meaning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, cases: int
) -> None:
    rng = random.Random(f"configs by meaning {kind}")
    documents = config_documents(tmp_path)
    path, taken = tmp_path / f"c.{kind}", 0
    for number in range(cases):
        document = copy.deepcopy(rng.choice(documents))
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            change(rng, document, ABSURD + UNREADABLE)
        path.write_text(yaml.safe_dump(document) if kind == "yaml" else json.dumps(document))
        taken += look(path, number, capsys)
    assert 0 < taken < cases / 2


def test_configs_changed_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random("configs as text")
    texts = [yaml.safe_dump(document) for document in config_documents(tmp_path)]
    path = tmp_path / "c.yaml"
    for number in range(300):
        lines = rng.choice(texts).splitlines()
        snippet, at = SNIPPETS[number % len(SNIPPETS)], rng.randrange(len(lines))
        match rng.randrange(4):
            case 0:
                lines.insert(at, snippet)
            case 1:
                lines[at] = lines[at].split(":")[0] + ": " + snippet
            case 2:
                lines = [f"dataset: {snippet}", *lines]
            case _:
                lines.insert(at, lines[rng.randrange(len(lines))])  # a setting given twice, perhaps elsewhere
        path.write_text("\n".join(lines) + "\n")
        look(path, number, capsys)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_oddity_of_yaml_is_survived(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], snippet: str
) -> None:
    path = tmp_path / "c.yaml"
    for text in (
        snippet,
        f"workdir: {snippet}",
        f"dataset: {{hooks: [{snippet}]}}",
        f"producers: {snippet}\n",
    ):
        path.write_text(text)
        look(path, 0, capsys)


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_configs_changed_as_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    rng = random.Random(f"configs as bytes {kind}")
    dump = json.dumps if kind == "json" else yaml.safe_dump
    wholes = [dump(document).encode() for document in config_documents(tmp_path)]
    path = tmp_path / f"c.{kind}"
    for number in range(300):
        data = change_bytes(rng, rng.choice(wholes))
        path.write_bytes(data if number % 10 else rng.randbytes(rng.randrange(500)))
        look(path, number, capsys)


@pytest.mark.parametrize(
    "text", ["dataset: BOMB", "producers: BOMB", "dataset: {hooks: [BOMB]}", "runs: [BOMB]", "nothing: BOMB"]
)
def test_a_bomb_of_aliases_costs_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text.replace("BOMB", bomb(10)))
    began = time.monotonic()
    assert config_error(tmp_path / "c.yaml") is not None
    assert time.monotonic() - began < 5


# Records


class Memory(ObjectStore):
    """Objects in a dict. Who asks it too often is going round in circles."""

    def __init__(self, objects: dict[str, bytes], url: str) -> None:
        self.url = url
        self.objects = dict(objects)
        self.asked = 0

    def _create(self, key: str, data: bytes) -> bool:
        return self.objects.setdefault(key, data) is data

    def put(self, key: str, data: bytes) -> None:
        self.objects[key] = data

    def get(self, key: str) -> bytes:
        self.asked += 1
        assert self.asked < 1000, f"asked for {key} again and again"
        if key not in self.objects:
            raise ObjectMissing(f"{self.url}/{key[:100]!r} is missing")
        return self.objects[key]

    def exists(self, key: str) -> bool:
        return key in self.objects

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        yield from [(key, len(data)) for key, data in self.objects.items() if key.startswith(prefix)]

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def probe(self) -> None:
        pass


Stores = dict[str, Memory]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of stored object, and what reads it.

    Attributes:
        store: which of the stores it lies in.
        readers: each returns something that can be compared.
    """

    name: str
    store: str
    key: str
    readers: list[Callable[[Memory], Any]]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """A corpus, a dataset of three chunks, and a run that was interrupted twice."""
    directory = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(corpus_module, "BLOCK_SEQUENCES", 4)
        corpus = LocalStore(str(directory / "corpus"))
        write_corpus(corpus, CORPUS_PLAN, {"train": packed(7), "held_out": packed(2)}, ["a", "b"])
        dataset = write_dataset(directory / "dataset", make_manifest(rows=[20, 15, 18]))
        runs = LocalStore(str(directory / "runs"))
        config, _ = submit_run(runs, JoinedDataset([dataset]), run_settings(window_chunks=2))
        for _ in range(2):
            lineage = take_over(
                runs, config.run_id, {"torch": "2", "threads": 1, "device": "cpu", "strict": True}
            )
            assert lineage is not None
            for position in (1, 2):
                lineage.commit(
                    position=position,
                    step=position,
                    rows=20,
                    checkpoint={"sae/topk": b"weights", "optimizer/topk": b"moments" * position},
                    history=[{"step": position, "saes": {"topk": {"loss": 1.5}}}],
                    metrics={"topk": {"loss": 1.5}},
                )
        dataset.store.create_record(floor_key(0), {"format_version": 1, "n": 0, "floor": 1})
        register_reader(dataset.store, Reader("another", str(directory / "runs"), 0, 1))
        whole = {"corpus": corpus, "dataset": dataset.store, "runs": runs}
        return {name: in_memory(store) for name, store in whole.items()}


CONTEXT = 5
CORPUS_PLAN: dict[str, object] = {
    "description": "text",
    "revision": None,
    "tokenizer_sha256": "aa",
    "special_ids": [0, 1],
    "bos": "prepend",
    "context": CONTEXT,
    "seed": 3,
    "held_out_rule": "none",
    "max_tokens": None,
    "max_held_out_tokens": 100,
}


def packed(n: int) -> PackedText:
    tokens = np.arange(n * CONTEXT, dtype=np.int32).reshape(n, CONTEXT)
    return PackedText(tokens, tokens % 2, np.ones(n, np.int32))


def in_memory(store: ObjectStore) -> Memory:
    return Memory({key: store.get(key) for key, _ in store.list("")}, store.url)


def opened_corpus(store: Memory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "open_store", lambda url: store)
        return open_corpus(store.url)


def corpus_tokens(store: Memory) -> Any:
    corpus = opened_corpus(store)
    n = min(5, corpus.n_sequences("train"))
    return corpus.tokens(0, n).tolist(), corpus.special_counts(0, n).tolist()


def chunk(store: Memory) -> Any:
    found = Dataset(store, load_manifest(store)).read_chunk(0)
    return [found.tokens.tolist(), {name: acts.tobytes() for name, acts in found.acts.items()}]


def the_run(store: Memory) -> str:
    """The id of the only run in a store."""
    return min(store.objects).split("/")[0]


def run_config(store: Memory) -> Any:
    return load_run_config(store, the_run(store))


def reader(store: Memory) -> Any:
    return read_reader(store, found_key("readers/*.json", store).split("/")[1].removesuffix(".json"))


def taken_over(store: Memory) -> Any:
    lineage = take_over(store, the_run(store), {})
    return lineage and (lineage.head.n, lineage.head.parent, lineage.load())


def newest(store: Memory) -> Any:
    return newest_head(store, the_run(store))


def checkpoint(store: Memory) -> Any:
    head = newest_head(store, the_run(store))
    return head and load_checkpoint(store, the_run(store), head)


def history(store: Memory) -> Any:
    return load_history(store, the_run(store), newest_head(store, the_run(store)))


def plan_of_run(store: Memory) -> Any:
    config = run_config(store)
    open_pinned(config)
    return [config.hooks, config.total_rows(), config.total_steps(), config.window_rows(0)]


def all_heads(store: Memory) -> Any:
    return chain(store, the_run(store), newest_head(store, the_run(store)))


KINDS = [
    Kind("dataset manifest", "dataset", "manifest.json", [load_manifest, chunk]),
    Kind("commit", "dataset", commit_key(0), [lambda store: read_commit(store, 0), chunk]),
    Kind("corpus manifest", "corpus", "manifest.json", [corpus_tokens]),
    Kind("documents", "corpus", "documents.json", [lambda store: opened_corpus(store).documents()]),
    Kind("run config", "runs", "*/config.json", [run_config, plan_of_run]),
    Kind("newest head", "runs", "*/heads/5.json", [newest, all_heads, taken_over, checkpoint, history]),
    Kind("older head", "runs", "*/heads/2.json", [all_heads, history]),
    Kind("history", "runs", "*/history/*", [history]),
    Kind("reader", "dataset", "readers/*.json", [reader]),
    Kind("floor", "dataset", floor_key(0), [newest_floor]),
]
ARRAYS = [
    Kind("activations", "dataset", "activations.zarr/acts/*", [chunk]),
    Kind("sequence numbers", "dataset", "activations.zarr/sequence/c/*", [chunk]),
    Kind("tokens of a corpus", "corpus", "corpus.zarr/train/tokens/c/*", [corpus_tokens]),
    Kind("checkpoint", "runs", "*/checkpoints/5-*", [checkpoint]),
]


def found_key(pattern: str, store: Memory) -> str:
    """The first key that fits a pattern."""
    keys = [key for key in store.objects if fnmatchcase(key, pattern)]
    return min(key for key in keys if not key.endswith(("zarr.json", ".copy")))


def spoilt(store: Memory, key: str, data: bytes) -> Memory:
    """The store with one object replaced. No copy stands in for it."""
    others = {k: v for k, v in store.objects.items() if not k.endswith(".copy")}
    return Memory(others | {key: data}, store.url)


def outcome(read: Callable[[Memory], Any], store: Memory) -> tuple[Any, PenstockError | None]:
    """What a reader gives, or its refusal; any other error is a bug."""
    try:
        return read(Memory(store.objects, store.url)), None
    except PenstockError as error:
        one_line(error)
        return None, error


@pytest.mark.parametrize("kind", [*KINDS, *ARRAYS], ids=lambda kind: kind.name)
def test_no_changed_byte_is_taken(stores: Stores, kind: Kind) -> None:
    rng = random.Random(f"bytes {kind.name}")
    store = stores[kind.store]
    key = found_key(kind.key, store)
    whole = store.objects[key]
    before = [outcome(read, spoilt(store, key, whole)) for read in kind.readers]
    assert [error for _, error in before] == [None] * len(before)
    for _ in range(100):
        data = change_bytes(rng, whole)
        if data == whole:
            continue
        for read in kind.readers:
            found, error = outcome(read, spoilt(store, key, data))
            assert isinstance(error, (DataError, UserError)), (data, found)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_records_changed_by_meaning(stores: Stores, kind: Kind) -> None:
    rng = random.Random(f"meaning {kind.name}")
    store = stores[kind.store]
    key = found_key(kind.key, store)
    record = decode_record(store.objects[key], key)
    for _ in range(150):
        changed = copy.deepcopy(record)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            change(rng, changed, ABSURD)
        try:
            data = encode_record(changed)
        except ValueError:
            continue
        for read in kind.readers:
            outcome(read, spoilt(store, key, data))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_field_of_a_record_is_checked(stores: Stores, kind: Kind) -> None:
    """Each field in turn, each absurd value: what is taken for it is what was stored, and of its type."""
    store = stores[kind.store]
    key = found_key(kind.key, store)
    record = decode_record(store.objects[key], key)
    for field in record:
        for value in [..., *ABSURD]:
            changed = {k: v for k, v in record.items() if k != field or value is not ...}
            if value is not ...:
                changed[field] = value
            data = encode_record(changed)
            for read in kind.readers:
                outcome(read, spoilt(store, key, data))


REENCODED: list[tuple[str, Callable[[Memory], dict[str, Any]]]] = [
    ("dataset manifest", lambda store: load_manifest(store).model_dump(mode="json")),
    ("corpus manifest", lambda store: opened_corpus(store).manifest.model_dump(mode="json")),
    ("commit", lambda store: read_commit(store, 0).record()),
    ("newest head", lambda store: read_head(store, the_run(store), 5).record()),
    # a setting that is not stored has its default: it may be younger than the config
    ("run config", lambda store: run_config(store).model_dump(mode="json", exclude_unset=True)),
]


@pytest.mark.parametrize(("name", "read"), REENCODED, ids=[name for name, _ in REENCODED])
def test_what_is_taken_is_what_is_stored(
    stores: Stores, name: str, read: Callable[[Memory], dict[str, Any]]
) -> None:
    rng = random.Random(f"again {name}")
    (kind,) = (kind for kind in KINDS if kind.name == name)
    store = stores[kind.store]
    key = found_key(kind.key, store)
    record = decode_record(store.objects[key], key)
    taken = 0
    for _ in range(150):
        changed = copy.deepcopy(record)
        change(rng, changed, ABSURD)
        data = encode_record(changed)
        found, error = outcome(read, spoilt(store, key, data))
        if error is None:
            taken += 1
            assert found == changed
            assert "true" in json.dumps(changed) or "true" not in json.dumps(found)
    assert taken < 75


NEWER = [
    "dataset manifest",
    "corpus manifest",
    "commit",
    "run config",
    "newest head",
    "history",
    "reader",
    "floor",
]


@pytest.mark.parametrize("name", NEWER)
@pytest.mark.parametrize("version", [2, 10**30])
def test_a_newer_format_is_refused_naming_both(stores: Stores, name: str, version: int) -> None:
    (kind,) = (kind for kind in KINDS if kind.name == name)
    store = stores[kind.store]
    key = found_key(kind.key, store)
    record = decode_record(store.objects[key], key) | {"format_version": version, "new": 1}
    for read in kind.readers:
        _, error = outcome(read, spoilt(store, key, encode_record(record)))
        assert isinstance(error, UserError)
        assert f"format version {version}" in str(error)
        assert "penstock reads 1: upgrade" in str(error)


@pytest.mark.parametrize("version", [True, 1.0, "1", None, [1]])
def test_a_format_that_is_no_whole_number_is_damage(stores: Stores, version: object) -> None:
    for kind in KINDS:
        if kind.name not in NEWER:
            continue
        store = stores[kind.store]
        key = found_key(kind.key, store)
        record = decode_record(store.objects[key], key) | {"format_version": version}
        _, error = outcome(kind.readers[0], spoilt(store, key, encode_record(record)))
        assert isinstance(error, DamagedObject), kind.name
