"""sparsify's coder with the steps of its trainer, which itself runs only beside a language model.

What happens to a batch there: the loss is the fraction of variance unexplained, plus the auxiliary one; the
part of the decoder's gradient along its rows is taken out; Adam or signum steps; rows get unit norm. See
`jobs`.
"""

from typing import Any

import torch
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig
from sparsify.sign_sgd import SignSGD

from benchmarks.peers.jobs import Rows, Trained, serve


def train(job: dict[str, Any], rows: Rows) -> Trained:
    config = SparseCoderConfig(num_latents=job["d_sae"], k=job["sparsity"])
    coder = SparseCoder(rows.d_in, config, device="cpu", dtype=torch.float32)
    signs = job["kind"] == "topk-signum"
    make = SignSGD if signs else torch.optim.Adam
    optimizer = make(coder.parameters(), lr=job["lr"])
    since = torch.zeros(job["d_sae"], dtype=torch.int64)
    for step, batch in enumerate(rows.batches(job)):
        if step == 0:
            coder.b_dec.data = batch.mean(dim=0)
        coder.set_decoder_norm_to_unit_norm()
        dead = since > job["dead_after"]
        out = coder(batch, dead_mask=dead)
        (out.fvu + out.auxk_loss / 32).backward()
        since += len(batch)
        since[out.latent_indices.flatten().unique()] = 0
        coder.remove_gradient_parallel_to_decoder_directions()
        left = job["steps"] - step
        rate = min(1.0, (step + 1) / job["warmup"], left / job["decay"])
        for group in optimizer.param_groups:
            group["lr"] = job["lr"] * rate
        optimizer.step()
        optimizer.zero_grad()
    coder.set_decoder_norm_to_unit_norm()

    def encode(x: torch.Tensor) -> torch.Tensor:
        found = coder.encode(x)
        full = torch.zeros(len(x), job["d_sae"])
        return full.scatter_(1, found.top_indices, found.top_acts)

    return encode, lambda acts: acts @ coder.W_dec + coder.b_dec


if __name__ == "__main__":
    serve(train)
