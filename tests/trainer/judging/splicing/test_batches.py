"""What is run at once is bounded, however much there is and however small the vocabulary."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from penstock.trainer.judging.splicing.text import LOGIT_BYTES, ROWS, Text
from penstock.trainer.judging.tasks.cloze import Item
from penstock.trainer.judging.tasks.prompts import batches

LARGE, SMALL = 50257, 61


@pytest.mark.parametrize("vocabulary", [LARGE, SMALL])
def test_rows_of_text_at_once(vocabulary: int) -> None:
    text = Text(np.ones((ROWS // 4, 16), np.int32), [0])
    found: list[Any] = list(text.batches(SimpleNamespace(vocabulary=vocabulary)))  # type: ignore[arg-type]
    assert sum(len(batch.tokens) for batch in found) == len(text)
    sizes = [batch.tokens.numel() for batch in found]
    assert max(sizes) <= min(ROWS, LOGIT_BYTES // (4 * vocabulary))
    assert max(sizes) > 128, "nor is it less than fits"


@pytest.mark.parametrize("vocabulary", [LARGE, SMALL])
def test_rows_of_prompts_at_once(vocabulary: int) -> None:
    items = [Item("task", "", "", (1,) * (1 + i % 64), 1) for i in range(2000)]
    dictionary = SimpleNamespace(module=SimpleNamespace(d_sae=32))
    subject: Any = SimpleNamespace(
        model=SimpleNamespace(vocabulary=vocabulary),
        text=SimpleNamespace(special_ids=[0]),
        dictionaries=[dictionary],
    )
    found = list(batches(subject, items))
    assert sorted(place for batch in found for place in batch.index) == list(range(len(items)))
    sizes = [batch.tokens.numel() for batch in found]
    assert max(sizes) <= min(ROWS, LOGIT_BYTES // (4 * vocabulary))
