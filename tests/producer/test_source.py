"""A chunk's rows are the model's own activations: bit for bit what plain torch hooks see in transformers."""

import logging
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from penstock.producer.plan import DatasetSettings, plan_dataset
from penstock.producer.source import LanguageModelSource
from penstock.store.corpus import Corpus
from penstock.store.manifest import Manifest
from services.lm import MLP_2, RESID_3, shipped_model, shipped_tokenizer

PER_CHUNK, PER_FORWARD = 6, 4


Points = dict[str, Any]
"""Hook point -> the torch module whose output it is."""


@cache
def pristine_model() -> Any:
    """The shipped model as transformers alone loads and runs it."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    return transformers.AutoModelForCausalLM.from_pretrained(
        shipped_model().files.directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def captured_by_plain_hooks(
    model: Any, points: Points, tokens: npt.NDArray[np.int32]
) -> dict[str, torch.Tensor]:
    """[B, C, D] float32 at each point, from whole forward passes of PER_FORWARD sequences."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in points}

    def note(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen[name].append((output[0] if isinstance(output, tuple) else output).clone())

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in points.items()]
    with torch.no_grad():
        for start in range(0, len(tokens), PER_FORWARD):
            model(torch.from_numpy(tokens[start : start + PER_FORWARD]).long())
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def as_bfloat16(acts: Any) -> torch.Tensor:
    """Stored rows as torch sees them."""
    return torch.from_numpy(acts.view(np.int16)).view(torch.bfloat16)


@pytest.fixture(scope="module")
def manifest(small_corpus: Corpus) -> Manifest:
    settings = DatasetSettings(
        hooks=[RESID_3, MLP_2], sequences_per_chunk=PER_CHUNK, sequences_per_forward=PER_FORWARD
    )
    return plan_dataset(settings, small_corpus, shipped_model())


@pytest.mark.parametrize("which", [0, 1, -1])
def test_activations_are_the_models_bit_for_bit(small_corpus: Corpus, manifest: Manifest, which: int) -> None:
    index = range(manifest.n_chunks)[which]
    chunk = LanguageModelSource(manifest, small_corpus, shipped_model()).chunk(index)
    first = index * PER_CHUNK
    last = min(first + PER_CHUNK, manifest.corpus.n_sequences)
    tokens = small_corpus.tokens(first, last)
    special = shipped_tokenizer().special_ids
    places = [(s, p) for s in range(len(tokens)) for p in range(24) if int(tokens[s, p]) not in special]

    assert chunk.index == index
    assert chunk.rows == len(places) == manifest.rows[index]
    assert chunk.sequence.tolist() == [first + s for s, _ in places]
    assert chunk.position.tolist() == [p for _, p in places]
    assert chunk.tokens.tolist() == [int(tokens[s, p]) for s, p in places]
    assert 0 not in chunk.position, "a BOS row was stored"

    layers = pristine_model().transformer.h
    points = {RESID_3: layers[3], MLP_2: layers[2].mlp.act}
    for hook, acts in captured_by_plain_hooks(pristine_model(), points, tokens).items():
        expected = torch.stack([acts[s, p] for s, p in places]).to(torch.bfloat16)
        stored = as_bfloat16(chunk.acts[hook])
        assert torch.equal(stored.view(torch.int16), expected.view(torch.int16)), hook


def test_special_rows_are_there_when_they_are_kept(small_corpus: Corpus) -> None:
    settings = DatasetSettings(hooks=[RESID_3], sequences_per_chunk=2, drop_special=False, max_rows=1)
    manifest = plan_dataset(settings, small_corpus, shipped_model())
    chunk = LanguageModelSource(manifest, small_corpus, shipped_model()).chunk(0)
    assert chunk.tokens.tolist() == small_corpus.tokens(0, 2).reshape(-1).tolist()
    assert chunk.position.tolist() == [*range(24), *range(24)]


def test_a_chunk_does_not_depend_on_what_was_made_before(small_corpus: Corpus, manifest: Manifest) -> None:
    source = LanguageModelSource(manifest, small_corpus, shipped_model())
    source.chunk(0)
    again = source.chunk(1).acts[MLP_2]
    fresh = LanguageModelSource(manifest, small_corpus, shipped_model()).chunk(1).acts[MLP_2]
    assert again.tobytes() == fresh.tobytes()


def test_progress_is_told_after_each_forward_pass(small_corpus: Corpus, manifest: Manifest) -> None:
    beats: list[int] = []
    LanguageModelSource(manifest, small_corpus, shipped_model(), lambda: beats.append(1)).chunk(0)
    assert len(beats) == 2
