"""sparsify's coder with the steps of its trainer, which itself runs only beside a language model.

What happens to a batch there: the loss is the fraction of variance unexplained, plus the auxiliary one. Of
an autoencoder, the part of the decoder's gradient along its rows is taken out, and rows have unit norm. A
transcoder's decoder starts at zero and has rows of any norm; its encoder's bias centres the first batch.
`-signum` kinds step as its default optimizer does: signs, averaged without a schedule; others with Adam. See
`jobs`.
"""

from collections.abc import Callable
from typing import Any

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from torch import Tensor

from benchmarks.peers.jobs import Step, Trained, serve


def begin(job: dict[str, Any], d_in: int) -> tuple[Step, Callable[[], Trained]]:
    transcode, skip = "transcoder" in job["kind"], job["kind"].startswith("skip-")
    config = SparseCoderConfig(
        num_latents=job["d_sae"], k=job["sparsity"], transcode=transcode, skip_connection=skip
    )
    coder = SparseCoder(d_in, config, device="cpu", dtype=torch.float32)
    free = None
    if job["kind"].endswith("-signum"):
        optimizer = free = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=job["lr"]), momentum=0.95)
        free.train()
    else:
        optimizer = torch.optim.Adam(coder.parameters(), lr=job["lr"])
    since = torch.zeros(job["d_sae"], dtype=torch.int64)

    def step(number: int, rows: Tensor, targets: Tensor) -> None:
        if number == 0:
            if transcode:
                coder.encoder.bias.data = -rows.mean(dim=0) @ coder.encoder.weight.data.T
            coder.b_dec.data = targets.mean(dim=0)
        if not transcode:
            coder.set_decoder_norm_to_unit_norm()
        out = coder(rows, targets, dead_mask=since > job["dead_after"])
        (out.fvu + out.auxk_loss / 32).backward()
        since.add_(len(rows))
        since[out.latent_indices.flatten().unique()] = 0
        if not transcode:
            coder.remove_gradient_parallel_to_decoder_directions()
        if free is None:
            rate = min(1.0, (number + 1) / job["warmup"], (job["steps"] - number) / job["decay"])
            for group in optimizer.param_groups:
                group["lr"] = job["lr"] * rate
        optimizer.step()
        optimizer.zero_grad()

    def encode(x: Tensor) -> Tensor:
        found = coder.encode(x)
        full = torch.zeros(len(x), job["d_sae"])
        return full.scatter_(1, found.top_indices, found.top_acts)

    def reconstruct(x: Tensor, acts: Tensor) -> Tensor:
        out: Tensor = acts @ coder.W_dec + coder.b_dec
        return out + x @ coder.W_skip.mT if skip else out

    def finish() -> Trained:
        if free is not None:
            free.eval()
        elif not transcode:
            coder.set_decoder_norm_to_unit_norm()
        return encode, reconstruct

    return step, finish


if __name__ == "__main__":
    serve(begin)
