"""SAELens's own trainer on rows that are given to it. See `jobs`."""

import tempfile
from collections.abc import Callable
from typing import Any

from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.peers.jobs import Step, Trained, decoding, serve


def _standard(shape: dict[str, Any], job: dict[str, Any]) -> Any:
    warm_up = job["steps"] // 5
    return StandardTrainingSAE(
        StandardTrainingSAEConfig(**shape, l1_coefficient=job["sparsity"], l1_warm_up_steps=warm_up)
    )


def _gated(shape: dict[str, Any], job: dict[str, Any]) -> Any:
    warm_up = job["steps"] // 5
    return GatedTrainingSAE(
        GatedTrainingSAEConfig(**shape, l1_coefficient=job["sparsity"], l1_warm_up_steps=warm_up)
    )


def _jumprelu(shape: dict[str, Any], job: dict[str, Any]) -> Any:
    warm_up = job["steps"] // 5
    return JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(**shape, l0_coefficient=job["sparsity"], l0_warm_up_steps=warm_up)
    )


def _matryoshka(shape: dict[str, Any], job: dict[str, Any]) -> Any:
    size = job["d_sae"]
    widths = [size // 16, size // 8, size // 4, size // 2, size]
    return MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(**shape, k=job["sparsity"], matryoshka_widths=widths)
    )


KINDS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "standard": _standard,
    "gated": _gated,
    "jumprelu": _jumprelu,
    "topk": lambda shape, job: TopKTrainingSAE(TopKTrainingSAEConfig(**shape, k=job["sparsity"])),
    "batchtopk": lambda shape, job: BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(**shape, k=job["sparsity"])
    ),
    "matryoshka": _matryoshka,
}


def begin(job: dict[str, Any], d_in: int) -> tuple[Step, Callable[[], Trained]]:
    shape = {"d_in": d_in, "d_sae": job["d_sae"], "device": "cpu", "dtype": "float32"}
    sae = KINDS[job["kind"]](shape, job)
    config = SAETrainerConfig(
        total_training_samples=job["steps"] * job["batch_rows"],
        train_batch_size_samples=job["batch_rows"],
        lr=job["lr"],
        lr_end=0.0,
        lr_warm_up_steps=job["warmup"],
        lr_decay_steps=job["decay"],
        dead_feature_window=max(1, job["dead_after"] // job["batch_rows"]),
    )
    trainer = SAETrainer(config, sae, iter(()))

    def step(number: int, rows: Tensor, targets: Tensor) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(rows)
        trainer.n_training_steps += 1

    def finish() -> Trained:
        # as its users run it: saved for inference, and loaded
        with tempfile.TemporaryDirectory() as directory:
            sae.save_inference_model(directory)
            loaded = SAE.load_from_disk(directory)
        return loaded.encode, decoding(loaded.decode)

    return step, finish


if __name__ == "__main__":
    serve(begin)
