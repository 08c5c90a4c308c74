"""Results kept part by part."""

from pathlib import Path
from typing import Any

import pytest

from penstock.common.errors import ModelError
from penstock.store.objects import open_store
from penstock.trainer.judging.parts import Parts


def test_a_part_is_computed_once_for_the_same_inputs(tmp_path: Path) -> None:
    store, calls = open_store(str(tmp_path)), list[str]()

    def compute() -> dict[str, Any]:
        calls.append("called")
        return {"value": len(calls), "pair": (1, 2)}

    first = Parts(store, {"weights": "a"}).part("positions/sae", compute)
    assert first == {"value": 1, "pair": [1, 2]}
    assert Parts(store, {"weights": "a"}).part("positions/sae", compute) == first
    assert Parts(store, {"weights": "b"}).part("positions/sae", compute)["value"] == 2
    assert len(calls) == 2


def test_a_torn_part_is_made_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    parts = Parts(store, {})
    parts.part("a", lambda: {"value": 1})
    store.put("parts/a.json", b'{"made_from": "')
    assert parts.part("a", lambda: {"value": 2}) == {"value": 2}


def test_a_part_holds_finite_numbers_only(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^a: a figure is not finite, .*; try model\.dtype float32$"):
        Parts(open_store(str(tmp_path)), {}).part("a", lambda: {"value": float("nan")})
    assert not list(open_store(str(tmp_path)).list("parts/"))
