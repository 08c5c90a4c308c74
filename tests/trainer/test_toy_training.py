"""Toy data trained through the pipeline and by a plain loop in memory: the same weights, bit for bit.

The loop below shares with the pipeline what makes the rows and what says in which order they come. Everything
else — the model, its loss, the optimizer — is written out here as the report has it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from penstock.common.permutation import derive_key, permutation
from penstock.producer.loop import produce
from penstock.producer.plan import DatasetSettings
from penstock.producer.sink import Sink
from penstock.producer.toy import Toy, ToySettings
from penstock.producer.toy_source import ToySource, plan_toy
from penstock.producer.work import Work
from penstock.store.dataset import open_dataset
from penstock.store.manifest import Manifest
from penstock.store.objects import open_store
from penstock.store.order import ReadingOrder
from penstock.store.queue import ChunkQueue
from penstock.store.retention import Retention
from penstock.store.truth import store_truth
from penstock.store.writer import DatasetWriter
from penstock.trainer.lineage import load_checkpoint
from services.producing import Impatient
from services.runs import Bench
from services.training import working

TOY = Toy(ToySettings(d_in=24, features=48, active=3.0, rows_per_sequence=32))
FEATURES, BATCH, WINDOW, EPOCHS, SEED, LR, L1 = 40, 64, 3, 2, 5, 2e-3, 0.4
WARMUP, L1_WARMUP, DECAY = 7, 11, 0.25


def plan() -> Manifest:
    return plan_toy(DatasetSettings(hooks=["toy"], max_rows=2_000, sequences_per_chunk=8, seed=9), TOY)


def pipeline(bench: Bench, url: Path, streaming: bool) -> dict[str, Tensor]:
    """Producer → store → queue → worker; with `streaming` while the dataset is being made."""
    manifest, store = plan(), open_store(str(url))
    writer = DatasetWriter(store, manifest)
    store_truth(store, manifest, TOY.truth)
    queue = ChunkQueue(bench.client, bench.redis.prefix, store.url, manifest.digest, "p", 20.0)
    repairs = ChunkQueue(
        bench.client, bench.redis.prefix, store.url, manifest.digest, "p", 20.0, repairs=True
    )
    work = Work(queue, repairs, writer, Retention(store, manifest, None), lambda: None)
    sink = Sink(writer, work, bench.client, queue.feeds_key, "p", lambda index, rows: None)
    sae: dict[str, Any] = {
        "name": "toy",
        "architecture": "standard",
        "hook_name": "toy",
        "d_sae": FEATURES,
        "l1_coefficient": L1,
        "l1_warmup_steps": L1_WARMUP,
        "lr": LR,
        "lr_warmup_steps": WARMUP,
        "lr_decay_fraction": DECAY,
        "initialisation": "orthogonal",
        "decoder_bias": "none",
        "seed": 3,
    }
    settings: dict[str, Any] = {
        "batch_rows": BATCH,
        "window_chunks": WINDOW,
        "epochs": EPOCHS,
        "seed": SEED,
        "saes": [sae],
    }
    source = ToySource(manifest, Toy(TOY.settings))
    try:
        if streaming:
            config = bench.submit(open_dataset(store.url), **settings)
            with working(bench):
                produce(work, source, sink, Impatient())
                while not bench.ended(config):
                    Impatient().wait()
        else:
            produce(work, source, sink, Impatient())
            config = bench.submit(open_dataset(store.url), **settings)
            bench.work()
    finally:
        writer.close()
    head = bench.head(config)
    assert head.status == "done"
    weights: dict[str, Tensor] = safetensors.torch.load(
        load_checkpoint(bench.runs, config.run_id, head)["sae/toy"]
    )
    return weights


def batches() -> Iterator[tuple[Tensor, int]]:
    """([B, D] float32 rows, their window's number): what there is to train on, without a store."""
    manifest = plan()
    source = ToySource(manifest, TOY)
    order = ReadingOrder((manifest.n_chunks,), EPOCHS, WINDOW, SEED)
    for number in range(order.n_windows):
        window, rows = order.window(number), []
        for position in range(window.start, window.stop):
            chunk = source.chunk(order.chunk_at(position))
            stored = permutation(chunk.rows, manifest.seed, "chunk", chunk.index)
            rows.append(chunk.acts["toy"][stored].astype(np.float32))
        mixed = np.concatenate(rows)
        mixed = mixed[permutation(len(mixed), SEED, "window", number)]
        n = -(-len(mixed) // BATCH)
        for i in range(n):
            yield torch.from_numpy(mixed[len(mixed) * i // n : len(mixed) * (i + 1) // n]), number


def plain_loop() -> dict[str, Tensor]:
    every = list(batches())
    first = torch.cat([rows for rows, window in every if window == 0]).double()
    # the input scale: rows of mean squared norm D
    scale = (24 / (first.square().sum(dim=0).sum().item() / len(first))) ** 0.5
    generator = torch.Generator().manual_seed(derive_key(3, "weights") >> 1)
    decoder = torch.randn(FEATURES, 24, generator=generator)
    torch.nn.init.orthogonal_(decoder, generator=generator)
    decoder /= decoder.norm(dim=1, keepdim=True)
    W_enc = (0.5 * decoder.T).requires_grad_()
    b_enc = torch.zeros(FEATURES, requires_grad=True)
    W_dec = decoder.clone().requires_grad_()
    adam = torch.optim.Adam([W_enc, b_enc, W_dec], lr=LR, fused=True)
    total = len(every)
    for step, (rows, _) in enumerate(every):
        x = rows * scale
        c = torch.relu(torch.addmm(b_enc, x, W_enc))
        x_hat = c @ (W_dec / W_dec.norm(dim=1, keepdim=True))
        loss = (x - x_hat).square().sum(dim=1).mean()
        loss = loss + L1 * min(1.0, (step + 1) / L1_WARMUP) * c.sum(dim=1).mean()
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = (
            LR * min(1.0, (step + 1) / WARMUP) * min(1.0, (total - step) / max(1.0, DECAY * total))
        )
        adam.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
    return {
        "W_enc": W_enc.detach(),
        "b_enc": b_enc.detach(),
        "W_dec": W_dec.detach(),
        "scale": torch.tensor(scale, dtype=torch.float64),
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_the_pipeline_gives_the_weights_of_a_plain_loop(
    bench: Bench, tmp_path: Path, streaming: bool
) -> None:
    trained, plain = pipeline(bench, tmp_path / "toy", streaming), plain_loop()
    assert not trained.pop("b_dec").any()
    assert trained.keys() == plain.keys()
    for name, values in plain.items():
        assert torch.equal(trained[name], values), (name, float((trained[name] - values).abs().max()))
    # not the start, and a dictionary that reconstructs
    assert int((plain["b_enc"] != 0).sum()) == FEATURES
