"""A producer's capture of hook points, against the forward pass alone.

Ours is the whole way from a chunk's index to its rows: tokens read from the corpus and checked, forward
passes, every hook point rounded to bfloat16, special tokens' rows left out. The limits get the token
tensors ready: TransformerLens's bridge, and the Hugging Face model cut off after the last layer needed, with
either attention kernel; with many hook points, the very model object that is captured from. Always on the
CPU, on one thread.
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

TWO = ["blocks.3.hook_resid_post", "blocks.2.mlp.hook_post"]
MANY = ["blocks.*.hook_resid_post", "blocks.*.mlp.hook_post", "blocks.*.hook_attn_out"]
LAST = "blocks.5.hook_resid_post"
LAYERS = 4
"""Blocks that run for two hook points: the last one is the output of block 3."""
SEQUENCES, PER_FORWARD, CONTEXT = 32, 16, 256
TOKENS = SEQUENCES * CONTEXT


def run(quick: bool, device: torch.device) -> list[Case]:
    """Two cases: a chunk of 32 sequences of the model that ships with us, few and many hook points."""
    threads = torch.get_num_threads()
    settings = ModelSettings()
    files = find_model(settings)
    rounds = 2 if quick else 9
    try:
        with tempfile.TemporaryDirectory(prefix="penstock-benchmark-") as directory:
            model = LanguageModel(files, settings)
            corpus = _corpus(files, Path(directory))
            return [_few(corpus, model, rounds), _many(corpus, model, rounds)]
    finally:
        torch.set_num_threads(threads)


def _few(corpus: Corpus, model: LanguageModel, rounds: int) -> Case:
    faster = LanguageModel(model.files, ModelSettings(attention="sdpa"))
    source, fast = _source(corpus, model, TWO), _source(corpus, faster, TWO)
    bridge = _stock_bridge(model.files)
    eager, sdpa = _bare_model(model.files, "eager"), _bare_model(model.files, "sdpa")
    batches = _batches(corpus)

    def through_bridge() -> None:
        with torch.inference_mode():
            for tokens in batches:
                bridge(tokens, return_type=None, stop_at_layer=LAYERS)

    def through_hugging_face(bare: Any) -> list[Tensor]:
        with torch.inference_mode():
            return [bare(input_ids=tokens, use_cache=False).last_hidden_state for tokens in batches]

    _check_same(source, torch.cat(batches), torch.cat(through_hugging_face(eager)))
    contenders: dict[str, Work] = {
        "LanguageModelSource": lambda: source.chunk(0),
        "bridge, no capture": through_bridge,
        "Hugging Face eager, no capture": lambda: through_hugging_face(eager),
        "Hugging Face sdpa, no capture": lambda: through_hugging_face(sdpa),
        "LanguageModelSource, sdpa": lambda: fast.chunk(0),
    }
    return _case(f"2 hook points, {LAYERS} layers", model, take_turns(contenders, rounds, model.device))


def _many(corpus: Corpus, model: LanguageModel, rounds: int) -> Case:
    source = _source(corpus, model, MANY)
    batches = _batches(corpus)

    def bare() -> None:
        for tokens in batches:
            model.capture(tokens, [LAST], lambda name, acts: None)

    contenders: dict[str, Work] = {
        "LanguageModelSource": lambda: source.chunk(0),
        "the same model, no capture": bare,
    }
    return _case("18 hook points, 6 layers", model, take_turns(contenders, rounds, model.device))


def _case(what: str, model: LanguageModel, seconds: dict[str, list[float]]) -> Case:
    title = f"{model.files.name}, {what}, {PER_FORWARD} × {CONTEXT} tokens per pass"
    return Case("harvest", title, "tokens/s", TOKENS, torch.get_num_threads(), seconds)


def _source(corpus: Corpus, model: LanguageModel, hooks: list[str]) -> LanguageModelSource:
    dataset = DatasetSettings(hooks=hooks, sequences_per_chunk=SEQUENCES, sequences_per_forward=PER_FORWARD)
    return LanguageModelSource(plan_dataset(dataset, corpus, model), corpus, model)


def _batches(corpus: Corpus) -> list[Tensor]:
    return list(torch.split(torch.from_numpy(corpus.tokens(0, SEQUENCES)).long(), PER_FORWARD))


def _stock_bridge(files: ModelFiles) -> Any:
    """TransformerLens's bridge as it boots."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(files.directory), device="cpu", dtype=torch.float32).eval()


def _bare_model(files: ModelFiles, attention: str) -> Any:
    """The Hugging Face model, ending after the last block that is needed."""
    import transformers

    model = transformers.AutoModel.from_pretrained(
        files.directory, dtype=torch.float32, local_files_only=True, attn_implementation=attention
    )
    model.h = model.h[:LAYERS]
    model.ln_f = torch.nn.Identity()
    return model.eval()


def _check_same(source: LanguageModelSource, tokens: Tensor, expected: Tensor) -> None:
    """All contenders must do the same work: compare ours with the bare model's output."""
    chunk = source.chunk(0)
    kept = torch.from_numpy(np.stack([chunk.sequence, chunk.position]))
    captured = torch.from_numpy(chunk.acts[TWO[0]].astype(np.float32))
    if not np.array_equal(chunk.tokens, tokens[kept[0], kept[1]].numpy()):
        raise RuntimeError("the source's tokens are not the corpus's")
    torch.testing.assert_close(captured, expected[kept[0], kept[1]], rtol=0.01, atol=0.01)


def _corpus(files: ModelFiles, directory: Path) -> Corpus:
    settings = CorpusSettings(
        url=str(directory), context=CONTEXT, max_tokens=TOKENS, max_held_out_tokens=CONTEXT
    )
    return ensure_corpus(settings, load_tokenizer(files), lambda done, wanted: None)
