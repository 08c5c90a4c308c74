"""Prompts of different lengths run through the model, and what it makes of their answers.

Prompts of similar length go together, padded on the right: a causal model's rows before the padding do not
see it. Rows of padding are neither replaced nor counted, so results do not depend on the batches.

Shapes: B prompts, C positions of the longest, V vocabulary, N kept rows, S features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from penstock.trainer.judging.splicing.splice import Pass
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.splicing.text import LOGIT_BYTES, ROWS
from penstock.trainer.judging.tasks.cloze import Item


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts.

    Attributes:
        index: which items they are.
        tokens: [B, C] int64.
        keep: [B, C] rows that count: neither special tokens nor padding.
        last: [B] position of each prompt's last token.
        answers: [B] first token of each answer.
    """

    index: list[int]
    tokens: Tensor
    keep: Tensor
    last: Tensor
    answers: Tensor

    def recent(self, last_tokens: int) -> Tensor:
        """[B, C] kept rows among so many last tokens of each prompt."""
        position = torch.arange(self.tokens.shape[1])
        return self.keep & (position > self.last[:, None] - last_tokens)

    def outcome(self, found: Pass) -> tuple[Tensor, Tensor]:
        """ln p(answer) [B] float64, and whether no other token is likelier [B] bool; on the CPU."""
        rows = torch.arange(len(self.index), device=found.logits.device)
        scores = found.logits[rows, self.last.to(rows.device)]
        right = scores.argmax(-1).cpu() == self.answers
        chosen = log_softmax(scores.double(), -1)[rows, self.answers.to(rows.device)]
        return chosen.cpu(), right


def width(subject: Subject) -> int:
    """Values that a pass holds per position: logits, or feature activations where there are more of them."""
    return max([subject.model.vocabulary, *(one.module.d_sae for one in subject.dictionaries)])


def batches(
    subject: Subject, items: Sequence[Item], which: Sequence[int] | None = None, at_once: int | None = None
) -> Iterator[Prompts]:
    """Items in batches, the shortest first.

    Args:
        which: places in `items`; an item may come several times. None: each once.
        at_once: prompts in a batch, at most; None: as many as their logits and features have memory for.
    """
    places = range(len(items)) if which is None else which
    cost = max(4 * width(subject), LOGIT_BYTES // ROWS)
    batch: list[int] = []
    for place in sorted(places, key=lambda one: len(items[one].tokens)):
        full = (len(batch) + 1) * len(items[place].tokens) * cost > LOGIT_BYTES
        if batch and (full or len(batch) == at_once):
            yield padded(items, batch, subject.text.special_ids)
            batch = []
        batch.append(place)
    if batch:
        yield padded(items, batch, subject.text.special_ids)


def padded(items: Sequence[Item], index: list[int], special_ids: Sequence[int]) -> Prompts:
    """One batch of items, padded on the right with each prompt's last token."""
    rows = [items[place].tokens for place in index]
    context = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[row[-1]] * (context - len(row))] for row in rows])
    last = torch.tensor([len(row) - 1 for row in rows])
    keep = ~torch.isin(tokens, torch.tensor(list(special_ids), dtype=torch.int64))
    keep &= torch.arange(context) <= last[:, None]
    return Prompts(index, tokens, keep, last, torch.tensor([items[place].answer_token for place in index]))


def owner(keep: Tensor) -> Tensor:
    """[N] which prompt of the batch each kept row belongs to."""
    return keep.nonzero()[:, 0]


def per_prompt(values: Tensor, keep: Tensor) -> Tensor:
    """Sums [B, …] over the kept rows of each prompt, of values [N, …] on any device."""
    total = values.new_zeros((len(keep), *values.shape[1:]))
    return total.index_add_(0, owner(keep).to(values.device), values)
