"""Cloze items made of Python text."""

from collections import Counter

import pytest

from penstock.common.documents import Document, is_held_out
from penstock.common.errors import UserError
from penstock.common.model.language_model import LanguageModel
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.splicing.text import Text
from penstock.trainer.judging.tasks import cloze_score
from penstock.trainer.judging.tasks.cloze import Cloze, Item, Maker
from penstock.trainer.judging.tasks.cloze_python import held_out_documents, python_items
from services.lm import shipped_tokenizer

SOURCE = """\
import os
from json import dumps

UNRELATED = 1


class Store:
    def save(self, record, folder):
        self.seen = record
        target = os.path.join(folder, self.seen)
        for name in self.names(["abc", "b"]):
            print(name)
        try:
            return open(target, "abc")
        except OSError:
            return dumps(record, default="abc")
"""
TASKS = ["parameter", "attribute", "loop", "import", "bracket", "quote", "keyword", "assign"]


def maker(limit: int = 128) -> Maker:
    return Maker(shipped_tokenizer(), limit, bos=True)


@pytest.fixture(scope="module")
def small() -> list[Item]:
    return python_items(maker(), 50, 0, [Document("a.py", SOURCE)])


@pytest.fixture(scope="module")
def built_in() -> list[Item]:
    return python_items(maker(), 50, 0)


def answers(items: list[Item], task: str) -> Counter[str]:
    return Counter(item.answer.strip() for item in items if item.task == task)


def test_what_each_task_asks_for(small: list[Item]) -> None:
    assert answers(small, "parameter") == {"record": 2, "folder": 1}
    assert answers(small, "attribute") == {"seen": 1}
    assert answers(small, "loop") == {"name": 1}
    assert answers(small, "import") == {"os": 1, "dumps": 1}
    assert answers(small, "bracket") == {")": 4}
    assert answers(small, "quote") == {'"': 2}
    assert answers(small, "keyword") == {"in": 1, "except": 1}


def test_a_prompt_ends_where_the_answer_begins(small: list[Item]) -> None:
    for item in small:
        if item.task not in ("assign", "import"):
            assert item.prompt + item.answer in SOURCE
    found = {item.answer.strip(): item.prompt for item in small if item.task == "import"}
    # what lies between the imports and the function is not shown
    assert found["os"].startswith("import os\nfrom json import dumps\n\n\n    def save(self")
    assert found["os"].endswith("        target =")
    assert "UNRELATED" not in found["dumps"]
    assert next(i.prompt for i in small if i.task == "attribute").endswith("os.path.join(folder, self.")


def test_a_template_asks_for_the_parameter_of_the_same_name(small: list[Item]) -> None:
    items = [item for item in small if item.task == "assign"]
    assert len(items) == len({item.prompt for item in items}) == 50
    for item in items:
        assert item.prompt.endswith(f"self.{item.answer.strip()} =")
        assert f",{item.answer}" in item.prompt


def test_the_same_seed_gives_the_same_items(small: list[Item]) -> None:
    documents = [Document("a.py", SOURCE)]
    assert python_items(maker(), 50, 0, documents) == small
    assert python_items(maker(), 50, 1, documents) != small


def test_prompts_keep_within_their_limit() -> None:
    items = python_items(maker(80), 50, 0, [Document("a.py", SOURCE), Document("b.py", SOURCE * 3)])
    assert max(len(item.tokens) for item in items) <= 80


def test_what_does_not_parse_or_is_not_ascii_gives_nothing() -> None:
    documents = [Document("a.py", "def broken(:\n"), Document("b.py", SOURCE.replace("UNRELATED", "größe"))]
    with pytest.raises(UserError, match="no item of task 'parameter'"):
        python_items(maker(), 5, 0, documents)


def test_there_are_at_least_50_of_each_task(built_in: list[Item]) -> None:
    assert Counter(item.task for item in built_in) == dict.fromkeys(TASKS, 50)
    assert len({(item.task, item.prompt) for item in built_in}) == len(built_in)


def test_only_held_out_sources_are_used() -> None:
    documents = held_out_documents()
    assert len(documents) > 10
    assert all(is_held_out(document.path) for document in documents)


def test_the_shipped_model_solves_some_of_each_task_and_not_all(
    model: LanguageModel, text: Text, built_in: list[Item]
) -> None:
    some = [item for task in TASKS for item in [i for i in built_in if i.task == task][:20]]
    record = cloze_score.measure(Subject(model, text, [], 256), Cloze(some))
    for task in TASKS:
        assert 0.05 <= record["clean"]["by_task"][task]["accuracy"] <= 0.95, task
