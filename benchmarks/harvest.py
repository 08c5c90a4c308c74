"""A producer's capture of two hook points, against the forward pass alone.

Ours is the whole way from a chunk's index to its rows: tokens read from the corpus and checked, forward
passes, both hook points rounded to bfloat16, special tokens' rows left out. The limits get the token
tensors ready: TransformerLens's bridge stopped after the same layer, and the Hugging Face model cut off
there, with the attention kernel that `transformers` chooses. Always on the CPU, on one thread.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Case, Work, take_turns
from penstock.common.model.files import ModelFiles, ModelSettings, find_model, load_tokenizer
from penstock.common.model.language_model import LanguageModel
from penstock.producer.corpus import CorpusSettings, ensure_corpus
from penstock.producer.plan import DatasetSettings, plan_dataset
from penstock.producer.source import LanguageModelSource
from penstock.store.corpus import Corpus

HOOKS = ["blocks.3.hook_resid_post", "blocks.2.mlp.hook_post"]
LAYERS = 4
"""Blocks that run: the last hook point is the output of block 3."""
SEQUENCES, PER_FORWARD, CONTEXT = 32, 16, 256
TOKENS = SEQUENCES * CONTEXT


def run(quick: bool, device: torch.device) -> list[Case]:
    """One case: a chunk of 32 sequences of the model that ships with us."""
    threads = torch.get_num_threads()
    settings = ModelSettings()
    files = find_model(settings)
    try:
        with tempfile.TemporaryDirectory(prefix="penstock-benchmark-") as directory:
            model = LanguageModel(files, settings)
            return [_compare(_corpus(files, Path(directory)), model, 2 if quick else 9)]
    finally:
        torch.set_num_threads(threads)


def _compare(corpus: Corpus, model: LanguageModel, rounds: int) -> Case:
    dataset = DatasetSettings(hooks=HOOKS, sequences_per_chunk=SEQUENCES, sequences_per_forward=PER_FORWARD)
    source = LanguageModelSource(plan_dataset(dataset, corpus, model), corpus, model)
    bare = _bare_model(model.files)
    batches = list(torch.split(torch.from_numpy(corpus.tokens(0, SEQUENCES)).long(), PER_FORWARD))

    def through_bridge() -> None:
        with torch.inference_mode():
            for tokens in batches:
                model._bridge(tokens, return_type=None, stop_at_layer=LAYERS)

    def through_hugging_face() -> list[Tensor]:
        with torch.inference_mode():
            return [bare(input_ids=tokens, use_cache=False).last_hidden_state for tokens in batches]

    _check_same(source, torch.cat(batches), torch.cat(through_hugging_face()))
    contenders: dict[str, Work] = {
        "LanguageModelSource": lambda: source.chunk(0),
        "bridge, no capture": through_bridge,
        "Hugging Face, no capture": through_hugging_face,
    }
    return Case(
        "harvest",
        f"{model.files.name}, 2 hook points, {LAYERS} layers, {PER_FORWARD} × {CONTEXT} tokens per pass",
        "tokens/s",
        TOKENS,
        torch.get_num_threads(),
        take_turns(contenders, rounds, model.device),
        [f"attention: {model.name_of_attention} in the bridge, {bare.config._attn_implementation} bare"],
    )


def _bare_model(files: ModelFiles) -> Any:
    """The Hugging Face model, ending after the last block that is needed."""
    import transformers

    model = transformers.AutoModel.from_pretrained(
        files.directory, dtype=torch.float32, local_files_only=True
    )
    model.h = model.h[:LAYERS]
    model.ln_f = torch.nn.Identity()
    return model.eval()


def _check_same(source: LanguageModelSource, tokens: Tensor, expected: Tensor) -> None:
    """All contenders must do the same work: compare ours with the bare model's output."""
    chunk = source.chunk(0)
    kept = torch.from_numpy(np.stack([chunk.sequence, chunk.position]))
    captured = torch.from_numpy(chunk.acts[HOOKS[0]].astype(np.float32))
    if not np.array_equal(chunk.tokens, tokens[kept[0], kept[1]].numpy()):
        raise RuntimeError("the source's tokens are not the corpus's")
    torch.testing.assert_close(captured, expected[kept[0], kept[1]], rtol=0.01, atol=0.01)


def _corpus(files: ModelFiles, directory: Path) -> Corpus:
    settings = CorpusSettings(
        url=str(directory), context=CONTEXT, max_tokens=TOKENS, max_held_out_tokens=CONTEXT
    )
    return ensure_corpus(settings, load_tokenizer(files), lambda done, wanted: None)
