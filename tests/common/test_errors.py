"""The error tree's promises: exit codes, and names suggested for misspelt ones."""

import pytest

from penstock.common import errors
from penstock.common.errors import PenstockError, nearest


def test_nearest_names_what_is_close() -> None:
    known = ["blocks.3.hook_resid_post", "blocks.3.hook_mlp_out", "embed"]
    hint = nearest("blocks.3.hook_resid_pots", known)
    assert hint.startswith(" Did you mean blocks.3.hook_resid_post")
    assert "embed" not in hint


def test_nearest_is_silent_when_nothing_is_close() -> None:
    assert nearest("zzz", ["alpha", "beta"]) == ""
    assert nearest("zzz", []) == ""


def test_nearest_is_limited() -> None:
    assert nearest("name", (f"name{i}" for i in range(9)), limit=2).count("name") == 2


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ConfigError", 2),
        ("PlanMismatch", 2),
        ("ModelError", 2),
        ("StoreError", 2),
        ("Unavailable", 2),
        ("ObjectMissing", 1),
        ("DamagedObject", 1),
        ("Fenced", 1),
        ("Diverged", 1),
    ],
)
def test_exit_codes_are_those_of_the_tree(name: str, code: int) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, PenstockError)
    assert kind.exit_code == code
    assert name in (errors.__doc__ or "")


def test_every_error_stands_in_the_tree() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, PenstockError)]
    assert len(kinds) > 10
    for kind in kinds:
        assert f"{kind.__name__} " in (errors.__doc__ or "") or f"{kind.__name__}\n" in (errors.__doc__ or "")
