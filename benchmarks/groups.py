"""Dictionaries of equal shape stepped in turn, as trainers do, against one batched step of all of them.

A group computes with [N, …] tensors: one launch for N dictionaries, the same arithmetic. Both are written
out here with the least that a standard step needs (forward, autograd, fused Adam, unit norms), so that only
the grouping differs; ours, with its figures and counters, is timed beside them.
"""

import torch
from torch import Tensor, nn

from benchmarks.measure import Case, Work, take_turns
from penstock.trainer.kinds import StandardSettings
from penstock.trainer.kinds.base import Schedule
from penstock.trainer.step import SAETraining

SHAPES = [(256, 512, 256, 8), (256, 2048, 256, 8), (512, 4096, 2048, 4)]
"""d_in, d_sae, rows per batch, dictionaries."""
PENALTY = 5.0


def run(quick: bool, device: torch.device) -> list[Case]:
    """A case per shape."""
    return [_case(*shape, rounds=2 if quick else 15, device=device) for shape in SHAPES]


def _case(d_in: int, d_sae: int, batch_rows: int, n: int, rounds: int, device: torch.device) -> Case:
    rows = torch.randn(batch_rows, d_in, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    contenders: dict[str, Work] = {
        f"{n} × SAETraining.step": _ours(d_in, d_sae, rows, n, device),
        f"{n} × plain step": _plain(d_in, d_sae, rows, n, device),
        "plain step of the group": _grouped(d_in, d_sae, rows, n, device),
    }
    title = f"{n} × standard: d_in {d_in}, d_sae {d_sae:,}, batch {batch_rows:,}"
    return Case("groups", title, "ms", 1, torch.get_num_threads(), take_turns(contenders, rounds, device))


def _ours(d_in: int, d_sae: int, rows: Tensor, n: int, device: torch.device) -> Work:
    trainings = []
    for seed in range(n):
        settings = StandardSettings(
            name="a",
            hook_name="synthetic",
            architecture="standard",
            d_sae=d_sae,
            seed=seed,
            l1_coefficient=PENALTY,
        )
        training = SAETraining(d_in, settings, device)
        training.initialise(rows.cpu())
        training.begin_window(rows.cpu(), 0)
        trainings.append(training)

    def work() -> None:
        for training in trainings:
            training.step(rows, Schedule(0, 1000))

    return work


def _plain(d_in: int, d_sae: int, rows: Tensor, n: int, device: torch.device) -> Work:
    steps = [_grouped(d_in, d_sae, rows, 1, device) for _ in range(n)]

    def work() -> None:
        for step in steps:
            step()

    return work


def _grouped(d_in: int, d_sae: int, rows: Tensor, n: int, device: torch.device) -> Work:
    """A step of n dictionaries at once; with n = 1, of one, by products of matrices."""
    lead = (n,) if n > 1 else ()
    W_dec = nn.Parameter(nn.functional.normalize(torch.randn(*lead, d_sae, d_in, device=device), dim=-1))
    W_enc = nn.Parameter(0.5 * W_dec.detach().transpose(-1, -2).contiguous())
    b_enc = nn.Parameter(torch.zeros(*lead, *([1] if lead else []), d_sae, device=device))
    b_dec = nn.Parameter(torch.zeros(*lead, *([1] if lead else []), d_in, device=device))
    optimizer = torch.optim.Adam([W_dec, W_enc, b_enc, b_dec], fused=True)

    def work() -> None:
        x = rows.float()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            acts = torch.relu((x - b_dec) @ W_enc + b_enc)
            error = x - (acts @ W_dec + b_dec)
            loss = (error.square().sum() + PENALTY * acts.sum()) / len(x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            W_dec.div_(torch.linalg.vector_norm(W_dec, dim=-1, keepdim=True))

    return work
