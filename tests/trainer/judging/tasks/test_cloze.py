"""Cloze items from files."""

import json
from pathlib import Path

import pytest

from penstock.common.errors import UserError
from penstock.trainer.judging.tasks.cloze import Cloze, Maker, load_cloze, read_lambada
from penstock.trainer.judging.tasks.task_settings import ClozeSettings
from services.lm import shipped_tokenizer

STORY = [f"{number} line {number} of a story ." for number in range(1, 21)]
QUESTION = "21 then XXXXX went home .\tfox\t\tcat|fox|hen"


def load(source: str, per_task: int = 60, seed: int = 0, max_tokens: int | None = None) -> Cloze:
    settings = ClozeSettings(sources=[source], per_task=per_task, seed=seed, max_tokens=max_tokens)
    return load_cloze(settings, shipped_tokenizer(), 256, bos=True)


def test_the_last_word_of_a_passage_is_the_answer(tmp_path: Path) -> None:
    file = tmp_path / "passages.txt"
    file.write_text("return the value\n\nimport os and sys  \n")
    first, second = load(f"lambada:{file}").items
    assert (first.task, first.prompt, first.answer) == ("passages", "return the", " value")
    assert (second.prompt, second.answer) == ("import os and", " sys")
    encode = shipped_tokenizer().tokenizer.encode
    assert first.tokens == (0, *encode("return the").ids)
    assert first.answer_token == encode(" value").ids[0]


def test_passages_as_json(tmp_path: Path) -> None:
    file = tmp_path / "passages.jsonl"
    texts = ["return the value", "one line\nand another"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert [(i.prompt, i.answer) for i in load(f"lambada:{file}").items] == [
        ("return the", " value"),
        ("one line\nand", " another"),
    ]


def test_a_childrens_book_test_question(tmp_path: Path) -> None:
    file = tmp_path / "cbt_NE.txt"
    file.write_text("\n".join([*STORY, QUESTION, "", *STORY, QUESTION.replace("XXXXX went", "did XXXXX go")]))
    first, second = load(f"cbt:{file}").items
    assert first.prompt.startswith("line 1 of a story .\nline 2")
    assert first.prompt.endswith("line 20 of a story .\nthen")
    assert (first.task, first.answer) == ("cbt_NE", " fox")
    assert second.prompt.endswith("\nthen did")


@pytest.mark.parametrize(
    ("kind", "lines", "at", "what"),
    [
        ("lambada", ["two words", "one"], 2, "two words or more"),
        ("lambada", ["two words", '{"text": '], 2, "begins like JSON"),
        ("lambada", ['{"texts": "a b"}'], 1, 'JSON without a "text"'),
        ("lambada", ['{"text": "single"}'], 1, "two words or more"),
        ("cbt", [*STORY[:3], *STORY[4:], QUESTION], 4, "expected line 4 of a story"),
        ("cbt", ["no number"], 1, "expected line 1"),
        ("cbt", [*STORY, QUESTION.replace("\t", " ")], 21, "separated by tabs"),
        ("cbt", [*STORY, QUESTION.replace("XXXXX", "it")], 21, "no XXXXX"),
        ("cbt", [*STORY, QUESTION.replace("|fox", "")], 21, "'fox' is not one of the candidates"),
        ("cbt", STORY, 20, "ends after line 20"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, kind: str, lines: list[str], at: int, what: str) -> None:
    file = tmp_path / "bad.txt"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError) as raised:
        load(f"{kind}:{file}")
    message = str(raised.value)
    assert message.startswith(f"cloze: {file}, line {at}: ")
    assert what in message
    assert "\n" not in message


def test_a_file_that_is_no_text_or_not_there_or_empty(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with pytest.raises(UserError, match=r"file cannot be read \(No such file"):
        list(read_lambada(file))
    file.write_bytes(b"two words\n\xff\xfe\n")
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        list(read_lambada(file))
    file.write_bytes(b"\n")
    with pytest.raises(UserError, match="no usable item"):
        load(f"lambada:{file}")
    with pytest.raises(UserError, match=r"evaluation\.cloze\.sources: 'lambda:x' is neither"):
        load("lambda:x")


def test_as_many_are_drawn_as_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "many.txt"
    file.write_text("".join(f"return number {n} as value\n" for n in range(200)))
    drawn = load(f"lambada:{file}", per_task=20)
    assert len(drawn.items) == 20
    assert drawn == load(f"lambada:{file}", per_task=20)
    assert drawn != load(f"lambada:{file}", per_task=20, seed=1)
    prompts = [int(item.prompt.split()[2]) for item in drawn.items]
    assert prompts == sorted(prompts)
    assert max(prompts) > 100


def test_an_answer_without_a_token_of_its_own_is_left_out() -> None:
    maker = Maker(shipped_tokenizer(), 64, bos=True)
    assert maker.item("t", "return s", "elf") is None
    item = maker.item("t", "return ", "self")
    assert item is not None
    assert item.answer == " self"
    assert item.answer_token == shipped_tokenizer().tokenizer.token_to_id("Ġself")


def test_space_with_a_token_of_its_own_asks_for_nothing() -> None:
    tokenizer = shipped_tokenizer()
    alone = tokenizer.tokenizer.encode(" },").ids
    assert len(alone) == 2
    item = Maker(tokenizer, 64, bos=False).item("t", "x = {y ", "}", ",")
    assert item is not None
    assert item.tokens[-1] == alone[0]
    assert item.answer_token == alone[1]


def test_a_long_prompt_loses_its_beginning() -> None:
    maker = Maker(shipped_tokenizer(), 10, bos=True)
    prompt = "import os\n" * 20 + "import"
    assert maker.item("t", prompt, " sys", whole=True) is None
    item = maker.item("t", prompt, " sys")
    assert item is not None
    assert len(item.tokens) == 10
    assert item.tokens[0] == 0
    assert item.tokens[-1] == shipped_tokenizer().tokenizer.encode("import").ids[-1]
    without = Maker(shipped_tokenizer(), 10, bos=False).item("t", prompt, " sys")
    assert without is not None
    assert without.tokens[-9:] == item.tokens[-9:]
    assert without.tokens[0] != 0


def test_two_files_of_one_name_are_not_thrown_together(tmp_path: Path) -> None:
    sources = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "passages.txt").write_text("return the value\n")
        sources.append(f"lambada:{tmp_path}/{folder}/passages.txt")
    with pytest.raises(
        UserError, match=r"second/passages\.txt gives a task 'passages', as a source before it"
    ):
        load_cloze(ClozeSettings(sources=sources), shipped_tokenizer(), 256, bos=True)
    assert load_cloze(ClozeSettings(sources=sources[:1]), shipped_tokenizer(), 256, bos=True).tasks() == [
        "passages"
    ]
