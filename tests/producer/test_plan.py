"""From settings to the manifest: chunk sizes, row counts, refusals."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from penstock.common.errors import ConfigError, ModelError, PlanMismatch
from penstock.common.model.files import ModelSettings, find_model
from penstock.common.model.language_model import LanguageModel
from penstock.producer.memory import STORE_THREADS, bytes_held, store_threads
from penstock.producer.plan import DatasetSettings, plan_dataset
from penstock.store.arrays import BLOSC
from penstock.store.corpus import Corpus
from penstock.store.manifest import Manifest, publish_manifest
from penstock.store.objects import open_store
from services.lm import MLP_2, RESID_3, shipped_model, shipped_tokenizer

MIB = 2**20


def plan(corpus: Corpus, **changes: Any) -> Manifest:
    base: dict[str, Any] = {"hooks": [RESID_3, MLP_2], "sequences_per_chunk": 7, "sequences_per_forward": 3}
    return plan_dataset(DatasetSettings(**base | changes), corpus, shipped_model())


def kept_rows(corpus: Corpus, per_chunk: int, drop_special: bool = True) -> list[int]:
    """Rows of each chunk, counted one token at a time."""
    n = corpus.manifest.n_sequences
    special = shipped_tokenizer().special_ids if drop_special else []
    tokens = corpus.tokens(0, n)
    return [
        sum(int(token) not in special for row in tokens[start : start + per_chunk] for token in row)
        for start in range(0, n, per_chunk)
    ]


def test_rows_of_a_chunk_are_its_tokens_less_the_special_ones(small_corpus: Corpus) -> None:
    manifest = plan(small_corpus)
    assert manifest.rows == kept_rows(small_corpus, 7)
    assert len(set(manifest.rows)) > 1
    assert manifest.rows_per_chunk == 7 * 23 >= max(manifest.rows)
    assert manifest.corpus.n_sequences == small_corpus.manifest.n_sequences
    assert [(hook.name, hook.d_in) for hook in manifest.hooks] == [(RESID_3, 192), (MLP_2, 768)]


def test_special_rows_can_be_kept(small_corpus: Corpus) -> None:
    manifest = plan(small_corpus, drop_special=False)
    assert manifest.rows == kept_rows(small_corpus, 7, drop_special=False)
    assert manifest.rows_per_chunk == 7 * 24 == manifest.rows[0]


@pytest.mark.parametrize("hooks", [[RESID_3], [RESID_3, MLP_2]])
def test_chosen_chunks_have_objects_of_at_most_32_mib(small_corpus: Corpus, hooks: list[str]) -> None:
    manifest = plan(small_corpus, hooks=hooks, sequences_per_chunk=None)
    widest = max(hook.d_in for hook in manifest.hooks)
    largest = manifest.sequences_per_chunk * 24 * widest * 2
    assert largest <= 32 * MIB < 2 * largest


def test_max_rows_takes_the_fewest_whole_chunks_that_suffice(small_corpus: Corpus) -> None:
    every = kept_rows(small_corpus, 7)
    for wanted in (1, every[0], every[0] + 1, sum(every[:5]), sum(every)):
        manifest = plan(small_corpus, max_rows=wanted)
        n = manifest.n_chunks
        assert manifest.rows == every[:n]
        assert sum(every[: n - 1]) < wanted <= sum(every[:n])
        assert manifest.corpus.n_sequences == min(7 * n, small_corpus.manifest.n_sequences)


def test_more_rows_than_there_is_text_for_are_refused(small_corpus: Corpus) -> None:
    total = sum(kept_rows(small_corpus, 7))
    with pytest.raises(ConfigError, match=rf"dataset\.max_rows: {total + 1} rows .* gives {total}"):
        plan(small_corpus, max_rows=total + 1)


def test_an_unknown_hook_names_near_ones(small_corpus: Corpus) -> None:
    with pytest.raises(ModelError, match=r"no hook 'blocks\.3\.hook_resid_pst'.*blocks\.3\.hook_resid_post"):
        plan(small_corpus, hooks=["blocks.3.hook_resid_pst"])
    with pytest.raises(ModelError, match=r"penstock inspect --model"):
        plan(small_corpus, hooks=["%%%"])


def test_a_hook_without_one_vector_per_position_is_refused(small_corpus: Corpus) -> None:
    with pytest.raises(ModelError, match=r"blocks\.2\.attn\.hook_pattern does not hold one vector"):
        plan(small_corpus, hooks=["blocks.2.attn.hook_pattern"])


@pytest.mark.parametrize("again", [RESID_3, "blocks.*.hook_resid_post"])
def test_a_hook_listed_twice_is_refused(small_corpus: Corpus, again: str) -> None:
    with pytest.raises(ModelError, match=rf"dataset\.hooks: {RESID_3} is listed twice"):
        plan(small_corpus, hooks=[RESID_3, again])


def test_patterns_stand_for_hooks_in_the_models_order(small_corpus: Corpus) -> None:
    hooks = plan(small_corpus, hooks=["blocks.[35].hook_resid_post", "blocks.?.mlp.hook_post"]).hooks
    names = ["blocks.3.hook_resid_post", "blocks.5.hook_resid_post"]
    names += [f"blocks.{layer}.mlp.hook_post" for layer in range(6)]
    assert [hook.name for hook in hooks] == names
    assert [hook.d_in for hook in hooks] == [192] * 2 + [768] * 6


def test_a_star_does_not_reach_over_a_dot(small_corpus: Corpus) -> None:
    with pytest.raises(ModelError, match=r"no hook 'blocks\.\*\.hook_post'. Did you mean"):
        plan(small_corpus, hooks=["blocks.*.hook_post"])


def test_chunks_are_sized_for_the_memory_there_is(small_corpus: Corpus) -> None:
    mlps: dict[str, Any] = {"hooks": ["blocks.*.mlp.hook_post"], "sequences_per_chunk": None}
    roomy = plan(small_corpus, **mlps)
    tight = plan(small_corpus, **mlps, memory_bytes=20_000_000)
    assert tight.sequences_per_chunk < roomy.sequences_per_chunk
    for manifest, budget in ((tight, 20_000_000), (roomy, 4_000_000_000)):
        held = bytes_held(manifest.chunk_bytes(), manifest.largest_object_bytes(), 1)
        assert held <= budget


def test_too_little_memory_is_refused_in_numbers() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.memory_bytes: 100 MB, but chunks of 60 MB need 200 MB"):
        store_threads(60_000_000, 10_000_000, 100_000_000)
    assert store_threads(60_000_000, 10_000_000, 255_000_000) == 2
    assert store_threads(60_000_000, 10_000_000, 10**10) == STORE_THREADS


def test_a_context_the_model_cannot_read_is_refused(small_corpus: Corpus) -> None:
    longer = small_corpus.manifest.model_copy(update={"context": 257})
    with pytest.raises(ConfigError, match=r"corpus\.context: 257 tokens, but .* at most 256"):
        plan(Corpus(small_corpus.store, longer))


def test_a_chunk_too_large_to_create_exclusively_is_refused(small_corpus: Corpus) -> None:
    sequences = 64 * MIB // (24 * 768 * 2) + 1
    with pytest.raises(ConfigError, match=r"dataset\.sequences_per_chunk: .* must stay under 64 MiB"):
        plan(small_corpus, sequences_per_chunk=sequences)


def test_everything_that_decides_the_bits_is_in_the_manifest(small_corpus: Corpus) -> None:
    import torch

    manifest = plan(small_corpus)
    assert manifest.numerics.torch == torch.__version__
    assert (manifest.numerics.threads, manifest.numerics.sequences_per_forward) == (1, 3)
    assert manifest.numerics.compute_dtype == "float32"
    assert manifest.numerics.attention == "eager"
    assert manifest.numerics.device.startswith("cpu ")
    assert manifest.corpus.digest == small_corpus.manifest.digest
    assert manifest.source.weights_sha256 == shipped_model().files.weights_sha256()
    same = plan(small_corpus)
    assert same.digest == manifest.digest
    for change in ({"seed": 1}, {"sequences_per_forward": 4}, {"sequences_per_chunk": 8}):
        assert plan(small_corpus, **change).digest != manifest.digest


def test_a_compressed_dataset_pins_its_compressor(small_corpus: Corpus) -> None:
    """Another version may compress to other bytes: its producers are refused, as with another torch."""
    plain, compressed = plan(small_corpus), plan(small_corpus, codec=BLOSC)
    assert compressed.codec == BLOSC
    assert compressed.numerics.libraries == f"{plain.numerics.libraries}, numcodecs {version('numcodecs')}"
    assert compressed.rows == plain.rows
    assert compressed.chunk_bytes() == plain.chunk_bytes() + 2 * 16


def test_a_control_is_never_taken_for_the_trained_model(small_corpus: Corpus, tmp_path: Path) -> None:
    trained = plan(small_corpus)
    store = open_store(str(tmp_path / "dataset"))
    publish_manifest(store, trained)
    control = ModelSettings(weights="random-keep-embeddings")
    model = LanguageModel(find_model(control), control)
    settings = DatasetSettings(hooks=[RESID_3, MLP_2], sequences_per_chunk=7, sequences_per_forward=3)
    pin = plan_dataset(settings, small_corpus, model).source
    assert pin.name == "builtin:pystd-6l (random-keep-embeddings, seed 0)"
    assert pin.weights_sha256 == model.files.weights_sha256()
    same_name = trained.model_copy(update={"source": pin.model_copy(update={"name": trained.source.name})})
    with pytest.raises(PlanMismatch, match=r"source\.weights_sha256 is 29b7\S+ there and 97d8\S+ here"):
        publish_manifest(store, same_name)
