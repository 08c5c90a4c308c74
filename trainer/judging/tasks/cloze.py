"""Cloze tasks: prompts whose continuation is known, from files and from Python text.

Only the first token of an answer counts. Prompt and answer are tokenised together, so that the answer's
first token is the one that the text would have; where the prompt's tokens then come out differently, the
answer does not begin with a token of its own, and the item is left out and counted.

    lambada   a passage per line, as text or as JSON {"text": …}; its last word is the answer
              (Paperno et al. 2016, "The LAMBADA dataset")
    cbt       20 numbered lines of a story; the 21st has XXXXX in place of a word, then tab-separated the
              answer, an optional field, and candidates separated by | (Hill et al. 2015, "The Goldilocks
              Principle"). What stands behind XXXXX is not shown to the model; candidates are only checked
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from penstock.common.errors import UserError
from penstock.common.model.files import LoadedTokenizer
from penstock.trainer.judging.tasks.task_settings import ClozeSettings

BUILTIN = "builtin"
BUILTIN_TOKENS = 128
"""Tokens of a prompt of the built-in set, at most, unless it is said otherwise."""
_GAP = "XXXXX"
_STORY_LINES = 20
_LAST_WORD = re.compile(r"(.*\S)(\s+)(\S+)\s*", re.DOTALL)
_NUMBERED = re.compile(r"(\d+) (.*)", re.DOTALL)


@dataclass(frozen=True)
class Item:
    """A prompt and what comes next.

    Attributes:
        tokens: of the prompt, BOS first if there is one.
        answer_token: the first token of the answer.
    """

    task: str
    prompt: str
    answer: str
    tokens: tuple[int, ...]
    answer_token: int


@dataclass(frozen=True)
class Cloze:
    """Items, and how many of each task were left out as the module says.

    Raises:
        UserError: there are no items.
    """

    items: list[Item]
    left_out: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.items:
            raise UserError("cloze: there are no prompts; give evaluation.cloze.sources some")

    def tasks(self) -> list[str]:
        """Names, each once, in order."""
        return list(dict.fromkeys(item.task for item in self.items))


@dataclass(frozen=True)
class Maker:
    """Turns text into items, at most `limit` tokens long."""

    tokenizer: LoadedTokenizer
    limit: int
    bos: bool

    def item(
        self, task: str, prompt: str, answer: str, rest: str = "", *, whole: bool = False
    ) -> Item | None:
        """An item, or None if the answer does not begin with a token of its own.

        Args:
            rest: what follows the answer, up to where it cannot matter any more.
            whole: a prompt that is too long gives None too, rather than lose its beginning.
        """
        if prompt.endswith(" "):
            # tokens hold the space before a word
            prompt, answer = prompt[:-1], " " + answer
        encoder = self.tokenizer.tokenizer
        shown: list[int] = encoder.encode(prompt, add_special_tokens=False).ids
        everything: list[int] = encoder.encode(prompt + answer + rest, add_special_tokens=False).ids
        if not shown or len(everything) == len(shown) or everything[: len(shown)] != shown:
            return None
        begin = len(shown)
        while begin < len(everything) - 1 and not encoder.decode(everything[begin : begin + 1]).strip():
            # space with a token of its own asks for nothing
            begin += 1
        shown = everything[:begin]
        first = [self.tokenizer.bos_id] if self.bos and self.tokenizer.bos_id is not None else []
        room = self.limit - len(first)
        if whole and len(shown) > room:
            return None
        return Item(task, prompt, answer, (*first, *shown[-room:]), everything[begin])


def load_cloze(settings: ClozeSettings, tokenizer: LoadedTokenizer, context: int, *, bos: bool) -> Cloze:
    """The items that settings ask for, in the order of their sources.

    Args:
        context: tokens that the model takes, at most.
        bos: whether prompts begin with BOS, as the corpus's sequences do or do not.

    Raises:
        UserError: a source is unknown, two give tasks of the same name, or a file is not what it should be;
            names file and line.
    """
    from penstock.trainer.judging.tasks.cloze_python import python_items

    items: list[Item] = []
    left_out: dict[str, int] = {}
    for source in settings.sources:
        taken = {item.task for item in items}
        if source == BUILTIN:
            limit = min(context, settings.max_tokens or BUILTIN_TOKENS)
            found = python_items(Maker(tokenizer, limit, bos), settings.per_task, settings.seed)
            items += _apart(found, taken, source)
            continue
        kind, _, name = source.partition(":")
        if kind not in _READERS or not name:
            raise UserError(
                f"evaluation.cloze.sources: {source!r} is neither {BUILTIN} nor lambada:FILE nor cbt:FILE"
            )
        path = Path(name).expanduser()
        maker = Maker(tokenizer, min(context, settings.max_tokens or context), bos)
        found, missed = _drawn(_READERS[kind](path), maker, path.stem, settings)
        if not found:
            raise UserError(f"cloze: {path} has no usable item; each line must hold a passage and its answer")
        items += _apart(found, taken, source)
        left_out[path.stem] = left_out.get(path.stem, 0) + missed
    return Cloze(items, left_out)


def _apart(found: list[Item], taken: set[str], source: str) -> list[Item]:
    """The items of a source; raises UserError if their tasks are called as some of a source before it."""
    for item in found:
        if item.task in taken:
            raise UserError(
                f"evaluation.cloze.sources: {source} gives a task {item.task!r}, as a source before it does; "
                "rename the file"
            )
    return found


def _drawn(
    pairs: Iterator[tuple[str, str]], maker: Maker, task: str, settings: ClozeSettings
) -> tuple[list[Item], int]:
    """`per_task` items, each equally likely, in the file's order, and how many could not be made.

    Holds no more than it gives back, however long the file is.
    """
    drawn: list[tuple[int, Item]] = []
    seen = missed = 0
    generator = random.Random(f"{settings.seed}:{task}")
    for prompt, answer in pairs:
        item = maker.item(task, prompt, answer)
        if item is None:
            missed += 1
            continue
        seen += 1
        if len(drawn) < settings.per_task:
            drawn.append((seen, item))
        elif (place := generator.randrange(seen)) < settings.per_task:
            drawn[place] = (seen, item)
    return [item for _, item in sorted(drawn, key=lambda pair: pair[0])], missed


def read_lambada(path: Path) -> Iterator[tuple[str, str]]:
    """Prompts and answers of a file of passages.

    Raises:
        UserError: a line is not a passage of two words or more, or the file cannot be read.
    """
    for number, line in _lines(path):
        text = _json_text(path, number, line) if line.lstrip().startswith("{") else line
        match = _LAST_WORD.fullmatch(text.lstrip())
        if match is None:
            raise _bad(path, number, "a passage needs two words or more")
        prompt, space, answer = match.groups()
        yield prompt + space, answer


def read_cbt(path: Path) -> Iterator[tuple[str, str]]:
    """Prompts and answers of a file in the format of the Children's Book Test.

    Raises:
        UserError: a line is out of turn, or the last one lacks its gap, answer or candidates; or the file
            cannot be read.
    """
    story: list[str] = []
    number = 0
    for number, line in _lines(path):
        match = _NUMBERED.fullmatch(line.strip("\r\n"))
        if match is None or int(match[1]) != len(story) + 1:
            raise _bad(path, number, f"expected line {len(story) + 1} of a story, a number and its text")
        if len(story) < _STORY_LINES:
            story.append(match[2].strip())
            continue
        yield _question(path, number, story, match[2])
        story = []
    if story:
        raise _bad(path, number, f"the file ends after line {len(story)} of a story; 21 belong to each")


def _question(path: Path, number: int, story: list[str], line: str) -> tuple[str, str]:
    fields = line.split("\t")
    if len(fields) < 3:
        raise _bad(path, number, "a question, its answer and candidates are separated by tabs")
    question, answer, candidates = fields[0].strip(), fields[1].strip(), fields[-1].strip().split("|")
    if _GAP not in question:
        raise _bad(path, number, f"the question has no {_GAP}")
    if not answer or answer not in candidates:
        raise _bad(path, number, f"the answer {answer!r} is not one of the candidates")
    return "\n".join([*story, question[: question.index(_GAP)]]), answer


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {"lambada": read_lambada, "cbt": read_cbt}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise _bad(path, number, "not UTF-8") from error
                if text.strip():
                    yield number, text.removeprefix("\ufeff")
    except OSError as error:
        raise UserError(f"cloze: {path} cannot be read ({error.strerror}); check the path") from error


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise _bad(path, number, "begins like JSON and is none") from error
    if not isinstance(found.get("text"), str):
        raise _bad(path, number, 'JSON without a "text"')
    return str(found["text"])


def _bad(path: Path, number: int, what: str) -> UserError:
    return UserError(f"cloze: {path}, line {number}: {what}")
