"""A few prompts of different lengths for the shipped model."""

from penstock.trainer.judging.tasks.cloze import Cloze, Item, Maker
from services.lm import shipped_tokenizer

_NAMES = ("value", "path", "name", "index", "handler", "encoding", "data", "level", "mode", "parent")


def few_prompts() -> Cloze:
    """Ten of the task `self` and ten of the task `assign`."""
    maker = Maker(shipped_tokenizer(), 64, bos=True)
    items: list[Item | None] = []
    for number, name in enumerate(_NAMES):
        lead = "import os\n" * (number % 4)
        items.append(maker.item("self", f"{lead}def get(self, {name}):\n    return", " self"))
    for number, name in enumerate(_NAMES):
        lead = "        self.size = size\n" * (number % 3)
        start = f"class A:\n    def __init__(self, size, {name}):\n{lead}"
        items.append(maker.item("assign", f"{start}        self.{name} =", f" {name}"))
    return Cloze([item for item in items if item is not None])
