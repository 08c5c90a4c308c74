"""How alike two dictionaries are, whatever the order of their features.

Dictionaries are [features, D]; rows need not have unit norm, and a row of nothing is like no other.
"""

import torch
from torch import Tensor

BLOCK = 4096
"""Features compared at a time with as many others: 64 MiB of cosines."""


def unit_rows(dictionary: Tensor) -> Tensor:
    """[S, D] float32 with rows of unit norm, those of nothing left as they are."""
    rows = dictionary.detach().float()
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0)


def max_cosines(dictionary: Tensor, reference: Tensor, block: int = BLOCK) -> Tensor:
    """[R] the largest cosine of any of a dictionary's features with each of a reference's.

    Memory does not grow with the product of the two sizes.

    Raises:
        ValueError: one has no features, or they are of different widths.
    """
    if not len(dictionary) or not len(reference) or dictionary.shape[1] != reference.shape[1]:
        raise ValueError(f"cannot compare dictionaries {[*dictionary.shape]} and {[*reference.shape]}")
    found = []
    for wanted in torch.split(reference, block):
        rows = unit_rows(wanted)
        best = [(unit_rows(part) @ rows.T).amax(dim=0) for part in torch.split(dictionary, block)]
        found.append(torch.stack(best).amax(dim=0))
    return torch.cat(found)


def mmcs(dictionary: Tensor, reference: Tensor, block: int = BLOCK) -> float:
    """Mean over a reference's features of their largest cosine with any of a dictionary's.

    Mean max cosine similarity ("Taking features out of superposition with sparse autoencoders", 2022):
    MMCS(D, D*) = mean_{d* in D*} max_{d in D} cos(d, d*). 1 where all of D* is in D. Two random dictionaries
    give about √(2 ln S / D): 0.2 for S = 512, D = 256. It is not symmetric.
    """
    return float(max_cosines(dictionary, reference, block).double().mean())


def duplicates(dictionary: Tensor, threshold: float = 0.9, block: int = BLOCK) -> int:
    """How many features are like an earlier one: a cosine of at least `threshold`.

    What MMCS does not see: a dictionary written twice keeps its MMCS, and half of it are duplicates.
    """
    repeated = torch.zeros(len(dictionary), dtype=torch.bool, device=dictionary.device)
    for start in range(0, len(dictionary), block):
        rows = unit_rows(dictionary[start : start + block])
        for before in range(0, start + 1, block):
            cosines = rows @ unit_rows(dictionary[before : before + block]).T
            if before == start:
                cosines = cosines.tril(diagonal=-1)
            repeated[start : start + block] |= (cosines >= threshold).any(dim=1)
    return int(repeated.sum())
