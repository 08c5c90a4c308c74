"""One-to-one matching of two dictionaries: no feature may stand for two."""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from penstock.trainer.methods.similarity import unit_rows

Floats = npt.NDArray[np.float64]


def matched_cosine(dictionary: Tensor, reference: Tensor) -> float:
    """Mean cosine over the pairs of the best one-to-one matching of two dictionaries [features, D].

    There are as many pairs as the smaller one has features. Equal to MMCS where every feature of the
    reference has its own in the dictionary; less where one has to serve several.
    """
    cosines = (unit_rows(reference) @ unit_rows(dictionary).T).cpu().double().numpy()
    if cosines.shape[0] > cosines.shape[1]:
        cosines = cosines.T
    return float(cosines[np.arange(len(cosines)), best_matching(cosines)].mean())


def best_matching(values: Floats) -> npt.NDArray[np.int64]:
    """For each row its own column, so that the sum of the values there is the largest.

    Shortest augmenting paths with dual variables (Jonker and Volgenant 1987), a row at a time; O(rows² ·
    columns) at worst, far less where rows agree little about the best column.

    Args:
        values: [rows, columns], with no more rows than columns.
    """
    n, m = values.shape
    if n > m:
        raise ValueError("fewer columns than rows")
    cost = -values
    u, v = np.zeros(n), np.zeros(m)
    row_of = np.full(m, -1)
    column_of = np.full(n, -1)
    for row in range(n):
        distance, previous = np.full(m, np.inf), np.full(m, -1)
        settled = np.zeros(m, dtype=bool)
        order: list[int] = []
        here, reached = row, 0.0
        while True:
            through = reached + cost[here] - u[here] - v
            closer = ~settled & (through < distance)
            distance[closer], previous[closer] = through[closer], here
            column = int(np.where(settled, np.inf, distance).argmin())
            reached = distance[column]
            if row_of[column] < 0:
                break
            settled[column] = True
            order.append(column)
            here = int(row_of[column])
        u[row] += reached
        for other in order:
            u[row_of[other]] += reached - distance[other]
            v[other] -= reached - distance[other]
        while True:  # give each row of the path the next one's column
            owner = int(previous[column])
            row_of[column] = owner
            column_of[owner], column = column, int(column_of[owner])
            if owner == row:
                break
    return column_of
