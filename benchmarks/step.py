"""One training step of an SAE, against the matrix products alone that it cannot do without.

A dense step needs five products: the two of the forward pass, the gradient of the feature activations,
and one gradient per weight matrix. AuxK adds three. They run on operands that lie ready, into outputs
that are allocated once, in the type that the step computes in: float32 on a CPU, bfloat16 on CUDA.
A TopK step has few non-zero activations, so only its encoder has to be dense: that one is shown too. Peers
step in processes of their own, which wait while others work; their time is taken inside.
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from benchmarks.measure import Case, Work, take_turns
from benchmarks.peer import PYTHON, Peer
from penstock.trainer.kinds import SAESettings, StandardSettings, TopKSettings
from penstock.trainer.kinds.base import Schedule
from penstock.trainer.step import SAETraining

D_IN, D_SAE, BATCH_ROWS, K = 512, 4096, 2048, 32
N_BATCHES = 4

PEERS = [
    ("standard", "saelens", "5.0"),
    ("standard", "dictionary_learning", "5.0"),
    (f"topk, k {K}", "saelens", str(K)),
    (f"topk, k {K}", "dictionary_learning", str(K)),
    (f"topk, k {K}", "sparsify", str(K)),
]
"""Case, library, and what sets the sparsity."""

STANDARD = StandardSettings(
    name="standard", hook_name="synthetic", d_sae=D_SAE, architecture="standard", l1_coefficient=5.0
)
TOPK = TopKSettings(name="topk", hook_name="synthetic", d_sae=D_SAE, architecture="topk", k=K)


def run(quick: bool, device: torch.device) -> list[Case]:
    """Three cases: ReLU-L1, TopK, and TopK with a quarter of its features dead."""
    rounds = 2 if quick else 9
    batches = _batches(device)
    products = _Products(device)
    contenders: dict[str, dict[str, Work]] = {
        "standard": {
            "SAETraining.step": _step(STANDARD, batches, device, dead=False),
            "5 dense products": products.dense,
        },
        f"topk, k {K}": {
            "SAETraining.step": _step(TOPK, batches, device, dead=False),
            "5 dense products": products.dense,
            "encoder's product": products.encoder,
        },
        f"topk, k {K}, with AuxK": {
            "SAETraining.step": _step(TOPK, batches, device, dead=True),
            "8 dense products": products.dense_with_auxk,
        },
    }
    shape = f"d_in {D_IN}, d_sae {D_SAE:,}, batch {BATCH_ROWS:,}, {products.dtype}".replace("torch.", "")
    notes = []
    with ExitStack() as stack:
        if device.type == "cpu" and Peer.available():
            for kind, library, sparsity in PEERS:
                peer = stack.enter_context(_peer(library, kind.split(",")[0], sparsity))
                contenders[kind][library] = peer.round
        else:
            notes.append(f"peers left out: on CPUs, where `make interop` made {PYTHON}")
        return [
            Case(
                "step",
                f"{kind}: {shape}",
                "ms",
                1,
                torch.get_num_threads(),
                take_turns(rivals, rounds, device),
                notes,
            )
            for kind, rivals in contenders.items()
        ]


def _peer(library: str, kind: str, sparsity: str) -> Peer:
    shape = (D_IN, D_SAE, BATCH_ROWS, torch.get_num_threads())
    return Peer("benchmarks.peers.steps", library, kind, sparsity, *shape)


def _step(
    settings: SAESettings, batches: list[Tensor], device: torch.device, dead: bool
) -> Callable[[], None]:
    training = SAETraining(D_IN, settings, device)
    training.initialise(batches[0].cpu())
    if dead:
        training.rows_since_active[: D_SAE // 4] = settings.dead_after_rows
    training.begin_window(torch.zeros(0, D_IN), 0)
    steps = 0

    def work() -> None:
        nonlocal steps
        training.step(batches[steps % len(batches)], Schedule(steps, 100_000))
        steps += 1

    return work


def _batches(device: torch.device) -> list[Tensor]:
    """[B, D] bfloat16 sums of a few of 2·D directions each, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2 * D_IN, D_IN, generator=generator)
    batches = []
    for _ in range(N_BATCHES):
        strength = torch.rand(BATCH_ROWS, len(directions), generator=generator)
        rows = torch.where(strength > 0.99, strength, 0.0) @ directions
        batches.append(rows.bfloat16().to(device))
    return batches


class _Products:
    """The matrix products of a step, over random operands."""

    def __init__(self, device: torch.device) -> None:
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

        def operand(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=self.dtype, device=device)

        self._x = operand(BATCH_ROWS, D_IN)
        self._acts = operand(BATCH_ROWS, D_SAE)
        self._W_enc = operand(D_IN, D_SAE)
        self._W_dec = operand(D_SAE, D_IN)
        self._out_rows = operand(BATCH_ROWS, D_IN)
        self._out_acts = operand(BATCH_ROWS, D_SAE)
        self._out_W_enc = operand(D_IN, D_SAE)
        self._out_W_dec = operand(D_SAE, D_IN)

    def encoder(self) -> None:
        torch.mm(self._x, self._W_enc, out=self._out_acts)

    def decoder(self) -> None:
        """Reconstruction, gradient of the activations, gradient of W_dec."""
        torch.mm(self._acts, self._W_dec, out=self._out_rows)
        torch.mm(self._x, self._W_dec.T, out=self._out_acts)
        torch.mm(self._acts.T, self._x, out=self._out_W_dec)

    def dense(self) -> None:
        self.encoder()
        self.decoder()
        torch.mm(self._x.T, self._acts, out=self._out_W_enc)

    def dense_with_auxk(self) -> None:
        self.dense()
        self.decoder()
