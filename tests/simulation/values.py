"""Redis' data types and how it writes numbers."""

from bisect import bisect_left, insort
from collections.abc import Iterator

Hash = dict[str, str]
StreamId = tuple[int, int]

MAX_ID: StreamId = (2**64 - 1, 2**64 - 1)


class SortedSet:
    """Members by score, then by name."""

    def __init__(self) -> None:
        self.scores: dict[str, float] = {}
        self._order: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[tuple[float, str]]:
        return iter(self._order)

    def copy(self) -> "SortedSet":
        other = SortedSet()
        other.scores, other._order = self.scores.copy(), self._order.copy()
        return other

    def add(self, member: str, score: float) -> None:
        """Add a member or move it."""
        self.remove(member)
        self.scores[member] = score
        insort(self._order, (score, member))

    def remove(self, member: str) -> bool:
        """Take a member out, if it is in."""
        score = self.scores.pop(member, None)
        if score is None:
            return False
        del self._order[bisect_left(self._order, (score, member))]
        return True

    def by_rank(self, start: int, stop: int) -> list[tuple[float, str]]:
        """From one rank to another, that one included; negative ones count from the end."""
        size = len(self._order)
        start = max(0, start + size if start < 0 else start)
        stop = stop + size if stop < 0 else stop
        return self._order[start : stop + 1] if stop >= 0 else []

    def by_score(self, low: str, high: str) -> list[tuple[float, str]]:
        """Scores in an interval as Redis writes it: `(` in front of a bound leaves it out."""
        least, most = float(low.lstrip("(")), float(high.lstrip("("))
        found = self._order[bisect_left(self._order, (least, "")) :]
        return [
            (score, member)
            for score, member in found
            if (score > least or low[0] != "(") and (score < most or (score == most and high[0] != "("))
        ]


class Stream:
    """Entries in order of their ids."""

    def __init__(self) -> None:
        self.entries: list[tuple[StreamId, list[str]]] = []
        self.last: StreamId = (0, 0)
        self.added = 0
        self.max_deleted: StreamId = (0, 0)
        self.groups: dict[str, StreamId] = {}

    def copy(self) -> "Stream":
        other = Stream()
        other.entries, other.last = self.entries.copy(), self.last
        other.added, other.max_deleted, other.groups = self.added, self.max_deleted, self.groups.copy()
        return other

    def after(self, last: StreamId) -> list[tuple[StreamId, list[str]]]:
        """Entries with a higher id."""
        return self.entries[bisect_left(self.entries, ((last[0], last[1] + 1), [])) :]

    def trim_before(self, first: StreamId) -> int:
        """Drop entries with a lower id; how many."""
        dropped = bisect_left(self.entries, (first, []))
        return self.drop(dropped)

    def drop(self, number: int) -> int:
        """Drop the first entries."""
        if number > 0:
            self.max_deleted = max(self.max_deleted, self.entries[number - 1][0])
            del self.entries[:number]
        return max(0, number)

    def delete(self, identity: StreamId) -> bool:
        """Take one entry out."""
        place = bisect_left(self.entries, (identity, []))
        if place == len(self.entries) or self.entries[place][0] != identity:
            return False
        del self.entries[place]
        self.max_deleted = max(self.max_deleted, identity)
        return True


class Set(dict[str, None]):
    """Members in order of adding: the order of a `set` of strings differs between runs."""

    def copy(self) -> "Set":
        return Set(self)


Value = str | Hash | Set | SortedSet | Stream


def kind(value: Value) -> str:
    """What the command TYPE says."""
    if isinstance(value, str):
        return "string"
    for type_, name in ((Set, "set"), (SortedSet, "zset"), (Stream, "stream")):
        if isinstance(value, type_):
            return name
    return "hash"


def number(value: float) -> str:
    """A score, as Redis writes it."""
    return str(int(value)) if value.is_integer() and abs(value) < 2**63 else repr(value)


def parse_id(text: str, sequence: int = 0) -> StreamId:
    """A stream id; `sequence` stands in for one that is left out."""
    first, _, second = text.partition("-")
    return int(first), int(second) if second else sequence


def format_id(identity: StreamId) -> str:
    return f"{identity[0]}-{identity[1]}"
