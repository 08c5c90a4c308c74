"""What a dictionary in place of a layer does to the layers behind it, as their dictionaries see it.

One dictionary is spliced at a time. For every dictionary that reads what leaves there, or a later hook point,
the very same tokens are measured in the clean pass and in the spliced one:

    squared_error  Σ_d (x − x̂)² of the measured dictionary's own reconstruction, in activations' units
    l0             its active features
    norm           ‖x‖ of what it reads
    stream_error   Σ‖x_spliced − x_clean‖² / Σ‖x_clean‖² of what it reads

The first three are compared as Σ spliced / Σ clean. At the hook point that is replaced, what is measured is
what leaves it: there `stream_error` is the spliced dictionary's own relative error. Layers are in the order
in which a forward pass comes by them. Rows of special tokens are in no figure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.trainer.judging.sequences.grid import on_grid
from penstock.trainer.judging.sequences.propagation_figures import show as show
from penstock.trainer.judging.sequences.ratios import Ratio
from penstock.trainer.judging.splicing.dictionaries import Dictionary, Identity
from penstock.trainer.judging.splicing.splice import Splice, forward
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.splicing.text import Batch

COMPARED = ("squared_error", "l0", "norm")

Rows = dict[str, Tensor]
"""Kept rows [N, D] per hook point."""


@torch.inference_mode()
def measure(
    subject: Subject, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Splice every dictionary and measure those behind it on all of the text.

    Args:
        progress: called with passes over sequences, done and in all.

    Returns:
        A record of finite numbers and nulls: `dictionaries` in the order of layers with their clean figures;
        `cells`, one per spliced and measured dictionary; `controls`, the largest stream error at any row and
        later hook point where an identity is spliced.
    """
    total = (1 + len(subject.dictionaries)) * len(subject.text)
    tally: _Tally | None = None
    done = 0
    for batch in subject.text.batches(subject.model):
        clean = forward(subject.model, batch.tokens, batch.keep, watch=subject.hook_names()).seen
        # a pass comes by them in their order, which is not that of the model's list of names
        tally = tally or _Tally(subject, list(clean))
        tally.add(batch, clean)
        done += (1 + len(subject.dictionaries)) * len(batch.tokens)
        progress(done, total)
    return tally.record() if tally else {}


@dataclass
class _Cell:
    """What is summed of a measured dictionary behind a spliced one."""

    ratios: dict[str, Ratio]
    spliced: dict[str, Ratio]


class _Tally:
    def __init__(self, subject: Subject, order: list[str]) -> None:
        self.subject, self.order = subject, order
        self.dictionaries = sorted(subject.dictionaries, key=lambda one: order.index(one.hook_name))
        self.clean = [self._ratios(COMPARED) for _ in self.dictionaries]
        self.cells = {
            (k, m): _Cell(self._ratios((*COMPARED, "stream_error")), self._ratios(COMPARED))
            for k, spliced in enumerate(self.dictionaries)
            for m, measured in enumerate(self.dictionaries)
            if order.index(measured.hook_name) >= order.index(spliced.hook_out)
        }
        self.controls: dict[str, float] = {}

    def _ratios(self, names: tuple[str, ...]) -> dict[str, Ratio]:
        return {name: Ratio(self.subject.trained_context) for name in names}

    def add(self, batch: Batch, seen: dict[str, Tensor]) -> None:
        keep = batch.keep
        clean = _rows(seen, keep)
        before = [_measured(one, clean, keep) for one in self.dictionaries]
        for ratios, values in zip(self.clean, before, strict=True):
            for name, value in values.items():
                ratios[name].add(value, None, keep)
        if not self.controls:
            self.controls = {
                one.hook_out: self._identity(batch, one.hook_out, clean) for one in self.dictionaries
            }
        for k, one in enumerate(self.dictionaries):
            behind = [m for j, m in self.cells if j == k]
            stream = self._spliced(batch, one, clean, [self.dictionaries[m] for m in behind])
            for m in behind:
                cell, hook = self.cells[k, m], self.dictionaries[m].hook_name
                after = _measured(self.dictionaries[m], stream, keep)
                for name, value in after.items():
                    cell.ratios[name].add(value, before[m][name], keep)
                    cell.spliced[name].add(value, None, keep)
                moved = (stream[hook].double() - clean[hook].double()).square().sum(-1)
                size = clean[hook].double().square().sum(-1)
                cell.ratios["stream_error"].add(on_grid(moved, keep), on_grid(size, keep), keep)

    def _spliced(self, batch: Batch, one: Dictionary, clean: Rows, measured: list[Dictionary]) -> Rows:
        """What these dictionaries read and replace while one is spliced: what leaves each hook point."""
        watch = {hook for other in measured for hook in (other.hook_name, other.hook_out)}
        seen = forward(self.subject.model, batch.tokens, batch.keep, [Splice(one)], sorted(watch)).seen
        stream = _rows(seen, batch.keep)
        # what arrives where it is replaced is what arrives in the clean pass; it is what leaves that differs
        x = clean[one.hook_name]
        return stream | {one.hook_out: one.module.reconstruct(x, one.module.encode(x))}

    def _identity(self, batch: Batch, place: str, clean: Rows) -> float:
        later = self.order[self.order.index(place) + 1 :]
        identity = Dictionary("identity", place, place, Identity())
        seen = forward(self.subject.model, batch.tokens, batch.keep, [Splice(identity)], later).seen
        stream = _rows(seen, batch.keep) | {place: identity.module.reconstruct(clean[place], clean[place])}
        largest = 0.0
        for hook, rows in stream.items():
            moved = (rows.double() - clean[hook].double()).square().sum(-1)
            size = clean[hook].double().square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
            largest = max(largest, float((moved / size).max()))
        return largest

    def record(self) -> dict[str, Any]:
        subject = self.subject
        return {
            "sequences": len(subject.text),
            "context": subject.text.context,
            "trained_context": subject.trained_context,
            "squared_error": "sum over dimensions, raw units",
            "hooks": self.order,
            "dictionaries": [
                {
                    "name": one.name,
                    "hook_name": one.hook_name,
                    "hook_out": one.hook_out,
                    "l0": ratios["l0"].overall()["mean"],
                    "clean": {name: ratio.overall() for name, ratio in ratios.items()},
                }
                for one, ratios in zip(self.dictionaries, self.clean, strict=True)
            ],
            "cells": [
                {
                    "spliced": self.dictionaries[k].name,
                    "measured": self.dictionaries[m].name,
                    "row": k,
                    "column": m,
                    "relative": {name: ratio.overall() for name, ratio in cell.ratios.items()},
                    "values": {name: ratio.overall() for name, ratio in cell.spliced.items()},
                }
                for (k, m), cell in self.cells.items()
            ],
            "controls": self.controls,
        }


def _rows(seen: dict[str, Tensor], keep: Tensor) -> Rows:
    return {hook: acts[keep.to(acts.device)] for hook, acts in seen.items()}


def _measured(one: Dictionary, stream: Rows, keep: Tensor) -> dict[str, Tensor]:
    """What is compared of a dictionary, each [B, C] float64 on the CPU."""
    x = stream[one.hook_name]
    acts = one.module.encode(x)
    residual = (stream[one.hook_out] - one.module.reconstruct(x, acts)).double().square().sum(-1)
    found = {"squared_error": residual, "l0": (acts > 0).sum(-1), "norm": x.double().norm(dim=-1)}
    return {name: on_grid(value, keep) for name, value in found.items()}
