"""The manifest: its bytes are the plan; another plan, format or damage is refused by name."""

from pathlib import Path
from typing import Any

import pytest

from penstock.common.errors import DamagedObject, ObjectMissing, PlanMismatch, UserError
from penstock.store.local import LocalStore
from penstock.store.manifest import (
    CorpusPin,
    HookSpec,
    Manifest,
    Numerics,
    SourcePin,
    load_manifest,
    publish_manifest,
)
from penstock.store.records import encode_record


def manifest(**changes: Any) -> Manifest:
    """A plan written out, with some of its fields changed: `numerics__threads=2`."""
    plan = Manifest(
        format_version=1,
        corpus=CorpusPin(
            digest="c0",
            description="text",
            first_sequence=0,
            n_sequences=6,
            context=8,
            tokenizer_sha256="aa",
            special_ids=[0],
            bos="prepend",
            held_out_rule="none",
        ),
        source=SourcePin(
            kind="language-model", name="tiny", revision=None, weights_sha256="bb", drop_special=True
        ),
        numerics=Numerics(
            device="cpu",
            torch="2.13.0",
            threads=1,
            compute_dtype="float32",
            attention="sdpa",
            capture="modules",
            libraries="transformers 5.23.0",
            sequences_per_forward=2,
            allow_mixed=False,
        ),
        hooks=[HookSpec(name="blocks.0.hook_out", d_in=8), HookSpec(name="blocks.1.hook_out", d_in=16)],
        sequences_per_chunk=4,
        rows_per_chunk=28,
        rows=[28, 14],
        seed=3,
        codec="bytes+crc32c",
        retention="keep",
    ).model_dump()
    for name, value in changes.items():
        *path, last = name.split("__")
        at = plan
        for part in path:
            at = at[part]
        at[last] = value
    return Manifest.model_validate(plan)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "dataset"))


def test_digest_is_golden() -> None:
    assert manifest().digest == "3268aa48f898e06c616446629dc12bfc0339417cfc908327b9c5c0a2b57d25ad"


def test_equal_plans_have_equal_bytes() -> None:
    assert manifest().encode() == manifest().encode()
    assert Manifest.model_validate(manifest().model_dump()).digest == manifest().digest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 4),
        ("rows", [28, 13]),
        ("numerics__threads", 2),
        ("corpus__digest", "c1"),
        ("source__weights_sha256", "bc"),
        ("hooks", [{"name": "blocks.0.hook_out", "d_in": 8}]),
        ("retention", "window"),
    ],
)
def test_every_field_counts(field: str, value: Any) -> None:
    assert manifest(**{field: value}).digest != manifest().digest


def test_counts_follow_from_the_rows() -> None:
    plan = manifest()
    assert (plan.n_chunks, plan.total_rows, plan.context) == (2, 42, 8)


def test_a_hook_that_is_not_there_is_refused() -> None:
    assert manifest().d_in("blocks.1.hook_out") == 16
    with pytest.raises(UserError, match=r"'blocks\.2.*blocks\.0\.hook_out, blocks\.1\.hook_out"):
        manifest().d_in("blocks.2.hook_out")


def test_a_published_manifest_comes_back(store: LocalStore) -> None:
    publish_manifest(store, manifest())
    assert load_manifest(store) == manifest()
    assert store.get("manifest.json") == manifest().encode()


def test_publishing_twice_is_one_dataset(store: LocalStore) -> None:
    publish_manifest(store, manifest())
    publish_manifest(store, manifest())
    assert sorted(key for key, _ in store.list("")) == ["manifest.copy", "manifest.json"]
    assert store.get("manifest.copy") == manifest().encode()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("seed", 4, "seed is 3 there and 4 here"),
        ("numerics__threads", 2, "numerics.threads is 1 there and 2 here"),
        ("numerics__torch", "2.14.0", "numerics.torch is 2.13.0 there and 2.14.0 here"),
        ("corpus__digest", "c1", "corpus.digest is c0 there and c1 here"),
        ("corpus__tokenizer_sha256", "ab", "corpus.tokenizer_sha256 is aa there and ab here"),
        ("source__weights_sha256", "bc", "source.weights_sha256 is bb there and bc here"),
        ("source__revision", "main", "source.revision is None there and main here"),
        (
            "hooks",
            [{"name": "blocks.0.hook_out", "d_in": 8}, {"name": "blocks.2.hook_out", "d_in": 16}],
            "hooks.1.name is blocks.1.hook_out there and blocks.2.hook_out here",
        ),
        ("retention", "window", "retention is keep there and window here"),
        ("rows", [28, 13], "rows.1 is 14 there and 13 here"),
        ("rows", [28], "rows is 2 long: [28, 14] there and 1 long: [28] here"),
    ],
)
def test_another_plan_is_refused_naming_the_difference(
    store: LocalStore, field: str, value: Any, said: str
) -> None:
    publish_manifest(store, manifest())
    with pytest.raises(PlanMismatch) as refusal:
        publish_manifest(store, manifest(**{field: value}))
    message = str(refusal.value)
    assert message.startswith(store.url)
    assert said in message
    assert "\n" not in message
    assert load_manifest(store) == manifest(), "what is there stays"


def test_many_differences_are_counted(store: LocalStore) -> None:
    publish_manifest(store, manifest())
    other = manifest(seed=9, codec="x", sequences_per_chunk=1, rows_per_chunk=7, corpus__context=2)
    with pytest.raises(PlanMismatch, match="and 2 more"):
        publish_manifest(store, other)


def test_mixed_numerics_are_accepted_only_where_recorded(store: LocalStore, tmp_path: Path) -> None:
    mixed = manifest(numerics__allow_mixed=True)
    publish_manifest(store, mixed)
    publish_manifest(store, manifest(numerics__allow_mixed=True, numerics__device="cuda"))
    assert load_manifest(store) == mixed
    with pytest.raises(PlanMismatch, match=r"numerics\.allow_mixed is True there and False here"):
        publish_manifest(store, manifest())
    with pytest.raises(PlanMismatch, match="seed is 3 there and 4 here"):
        publish_manifest(store, manifest(numerics__allow_mixed=True, seed=4))
    strict = LocalStore(str(tmp_path / "strict"))
    publish_manifest(strict, manifest())
    with pytest.raises(PlanMismatch, match=r"numerics\.allow_mixed is False there and True here"):
        publish_manifest(strict, mixed)


@pytest.mark.parametrize("version", [None, "1"])
def test_a_record_without_a_format_is_damaged(store: LocalStore, version: Any) -> None:
    record = manifest().model_dump(mode="json") | {"format_version": version}
    store.create("manifest.json", encode_record(record))
    with pytest.raises(DamagedObject, match="format version"):
        load_manifest(store)


@pytest.mark.parametrize("version", [2, 999])
def test_another_format_is_refused(store: LocalStore, version: int) -> None:
    record = manifest().model_dump(mode="json") | {"format_version": version, "new_field": 1}
    store.create("manifest.json", encode_record(record))
    with pytest.raises(UserError, match=f"format version {version}.*upgrade penstock"):
        load_manifest(store)


def test_no_manifest_is_no_dataset(store: LocalStore) -> None:
    with pytest.raises(ObjectMissing, match=r"manifest\.json"):
        load_manifest(store)


def test_a_record_that_is_no_manifest_is_damaged(store: LocalStore) -> None:
    record = manifest().model_dump(mode="json") | {"rows": "many"}
    store.create("manifest.json", encode_record(record))
    with pytest.raises(DamagedObject, match="not a manifest: rows"):
        load_manifest(store)


def test_a_damaged_manifest_is_not_used(store: LocalStore) -> None:
    store.create("manifest.json", manifest().encode().replace(b'"seed":3', b'"seed":4'))
    with pytest.raises(DamagedObject, match="checksum"):
        load_manifest(store)
    with pytest.raises(DamagedObject, match="checksum"):
        publish_manifest(store, manifest())
