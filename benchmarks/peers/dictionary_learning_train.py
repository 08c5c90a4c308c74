"""dictionary_learning's own trainers on rows that are given to them. See `jobs`."""

from collections.abc import Callable
from typing import Any

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from torch import Tensor

from benchmarks.peers.jobs import Step, Trained, decoding, serve


def _trainer(job: dict[str, Any], d_in: int) -> Any:
    shared = {
        "steps": job["steps"],
        "activation_dim": d_in,
        "dict_size": job["d_sae"],
        "layer": 0,
        "lm_name": "none",
        "lr": job["lr"],
        "warmup_steps": job["warmup"],
        "decay_start": job["steps"] - job["decay"],
        "seed": job["seed"],
        "device": "cpu",
    }
    kind, value, warm_up = job["kind"], job["sparsity"], job["steps"] // 5
    by_k = {"k": value, "threshold_start_step": job["steps"] // 2}
    if kind == "standard":
        return StandardTrainer(**shared, l1_penalty=value, sparsity_warmup_steps=warm_up)
    if kind == "standard-april":
        return StandardTrainerAprilUpdate(**shared, l1_penalty=value, sparsity_warmup_steps=warm_up)
    if kind == "gated":
        return GatedSAETrainer(**shared, l1_penalty=value, sparsity_warmup_steps=warm_up)
    if kind == "jumprelu":
        return JumpReluTrainer(**shared, target_l0=value, sparsity_warmup_steps=warm_up)
    if kind == "topk":
        return TopKTrainer(**shared, **by_k)
    if kind == "batchtopk":
        return BatchTopKTrainer(**shared, **by_k)
    if kind == "matryoshka":
        fractions = [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
        return MatryoshkaBatchTopKTrainer(**shared, **by_k, group_fractions=fractions)
    raise KeyError(kind)


def begin(job: dict[str, Any], d_in: int) -> tuple[Step, Callable[[], Trained]]:
    trainer = _trainer(job, d_in)
    if hasattr(trainer, "dead_feature_threshold"):
        trainer.dead_feature_threshold = job["dead_after"]

    def step(number: int, rows: Tensor, targets: Tensor) -> None:
        trainer.update(number, rows)

    return step, lambda: (trainer.ae.encode, decoding(trainer.ae.decode))


if __name__ == "__main__":
    serve(begin)
