"""Which metrics and labels a PromQL expression uses.

Not a parser: enough to tell names of series from functions, keywords, labels and durations. What Prometheus
thinks of the expressions is for promtool and a real server to say.
"""

import re
from dataclasses import dataclass, field

_STRING = r'"(?:[^"\\]|\\.)*"'
_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)")
_SELECTOR = re.compile(rf"({_NAME})\s*\{{((?:{_STRING}|[^{{}}])*)\}}")
_MATCHER = re.compile(rf"({_NAME})\s*(?:=~|!~|!=|=)\s*({_STRING})")
_RANGE = re.compile(r"\[[^\]]*\]|\boffset\s+-?\w+|\b\d[\w.]*")
_WORD = re.compile(rf"({_NAME})\s*(\(?)")
_KEYWORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "bool", "group_left", "group_right"}


@dataclass
class Used:
    """Metric -> labels that are matched of it; and labels that series are grouped or joined by."""

    metrics: dict[str, set[str]] = field(default_factory=dict)
    grouping: set[str] = field(default_factory=set)


def used_in(expr: str) -> Used:
    """What an expression uses. Grafana's variables may stand in it."""
    found = Used()
    rest = re.sub(r"\$\w+", "1m", expr)

    def selected(match: "re.Match[str]") -> str:
        labels = {label for label, _ in _MATCHER.findall(match[2])}
        left = _MATCHER.sub("", match[2]).replace(",", "").strip()
        assert not left, f"{left!r} is no matcher: {expr}"
        found.metrics.setdefault(match[1], set()).update(labels)
        return " "

    rest = _SELECTOR.sub(selected, rest)
    for match in _GROUPING.finditer(rest):
        found.grouping |= {label.strip() for label in match[1].split(",") if label.strip()}
    rest = _RANGE.sub(" ", re.sub(_STRING, " ", _GROUPING.sub(" ", rest)))
    for name, opening in _WORD.findall(rest):
        if not opening and name not in _KEYWORDS:
            found.metrics.setdefault(name, set())
    return found
