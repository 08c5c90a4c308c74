"""sparsify's coder with the steps of its trainer, which itself runs only beside a language model.

What happens to a batch there: the loss is the fraction of variance unexplained, plus the auxiliary one; the
part of the decoder's gradient along its rows is taken out; Adam or signum steps; rows get unit norm. See
`jobs`.
"""

from collections.abc import Callable
from typing import Any

import torch
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig
from sparsify.sign_sgd import SignSGD

from benchmarks.peers.jobs import Step, Trained, serve


def begin(job: dict[str, Any], d_in: int) -> tuple[Step, Callable[[], Trained]]:
    config = SparseCoderConfig(num_latents=job["d_sae"], k=job["sparsity"])
    coder = SparseCoder(d_in, config, device="cpu", dtype=torch.float32)
    make = SignSGD if job["kind"] == "topk-signum" else torch.optim.Adam
    optimizer = make(coder.parameters(), lr=job["lr"])
    since = torch.zeros(job["d_sae"], dtype=torch.int64)

    def step(number: int, rows: torch.Tensor) -> None:
        if number == 0:
            coder.b_dec.data = rows.mean(dim=0)
        coder.set_decoder_norm_to_unit_norm()
        out = coder(rows, dead_mask=since > job["dead_after"])
        (out.fvu + out.auxk_loss / 32).backward()
        since.add_(len(rows))
        since[out.latent_indices.flatten().unique()] = 0
        coder.remove_gradient_parallel_to_decoder_directions()
        rate = min(1.0, (number + 1) / job["warmup"], (job["steps"] - number) / job["decay"])
        for group in optimizer.param_groups:
            group["lr"] = job["lr"] * rate
        optimizer.step()
        optimizer.zero_grad()

    def encode(x: torch.Tensor) -> torch.Tensor:
        found = coder.encode(x)
        full = torch.zeros(len(x), job["d_sae"])
        return full.scatter_(1, found.top_indices, found.top_acts)

    def finish() -> Trained:
        coder.set_decoder_norm_to_unit_norm()
        return encode, lambda acts: acts @ coder.W_dec + coder.b_dec

    return step, finish


if __name__ == "__main__":
    serve(begin)
