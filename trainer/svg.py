"""matplotlib's SVG documents as elements of an HTML page, made small.

A page holds dozens of figures. Most of what matplotlib writes is repetition: styles that neighbours share,
groups of one element, coordinates with more digits than a screen shows.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from html import escape

GRAIN = 10
"""Steps to a unit of the view box that coordinates are rounded to: a tenth is about a seventh of a pixel."""
_PATH = re.compile(r'<path d="([^"]*)"([^>]*)/>')
_RUN = re.compile(r'(?:<path d="[^"]*"[^>]*/>\s*){2,}')
_TOKEN = re.compile(r"[A-Za-z]|-?[\d.]+(?:e-?\d+)?")


def inline(svg: str, alt: str, width: int, height: int) -> str:
    """A document as an element named `alt`, whose ids are in nobody's way."""
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    # Its style sheet would apply to the whole page, and its group ids repeat in every figure.
    body = re.sub(r"<style\b.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r">\s+<", "><", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*"|; stroke-linejoin: miter|; font-family: [^;"]*', "", body)
    body = re.sub(r'<path d="[^"]*"(?: clip-path="[^"]*")? style="fill: none"/>', "", body)
    body = re.sub(r' (x|y)="(-?\d+\.\d)\d*"', r' \1="\2"', body)
    body = _without_plain_groups(body)
    body = _RUN.sub(lambda run: "".join(_merged(_PATH.findall(run[0]))), body)
    body = re.sub(r'(?<= d=")[^"]*', lambda d: short_path(d[0]), body)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(alt)}">{body}'


def _without_plain_groups(body: str) -> str:
    """A group that says nothing of what is in it is nothing."""
    open_: list[bool] = []

    def keep(tag: re.Match[str]) -> str:
        if tag[0].endswith("/>"):
            return ""
        if tag[0] != "</g>":
            open_.append(tag[0] != "<g>")
            return tag[0] if open_[-1] else ""
        return tag[0] if open_.pop() else ""

    return re.sub(r"</?g\b[^>]*>", keep, body).replace("<defs></defs>", "")


def _merged(paths: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Neighbours that look the same as one path; not where one that shines through covers another."""
    for attributes, same in itertools.groupby(paths, key=lambda path: path[1]):
        drawn = [d for d, _ in same]
        if "opacity" not in attributes:
            drawn = [" ".join(drawn)]
        yield from (f'<path d="{d}"{attributes}/>' for d in drawn)


def short_path(d: str) -> str:
    """The same path in fewer characters; points are rounded where they are, so nothing adds up."""
    tokens = _TOKEN.findall(d)
    if {token for token in tokens if token.isalpha()} - set("MLz"):
        return re.sub(r"(\.\d\d)\d+", r"\1", d)  # curves
    out: list[str] = []
    at, drawn, last, pieces = (0, 0), True, "", iter(tokens)
    for token in pieces:
        if token == "z":
            out.append("z")
            drawn, last = True, "z"
            continue
        x, y = (round(GRAIN * float(next(pieces))) for _ in range(2))
        if token == "M":
            out.append(("M" if drawn else "h0M") + _pair(x, y))
            drawn, last = False, "M"
        elif (x, y) != at:
            step = _pair(x - at[0], y - at[1])
            # a letter that is the one before can be left out
            out.append(
                step if last == "l" and step.startswith("-") else f" {step}" if last == "l" else f"l{step}"
            )
            drawn, last = True, "l"
        at = x, y
    # what has no length is a dot where line ends are round
    return "".join(out) + ("" if drawn else "h0")


def _pair(x: int, y: int) -> str:
    first, second = (re.sub(r"^(-?)0\.", r"\1.", f"{value / GRAIN:g}") for value in (x, y))
    return first + ("" if second.startswith("-") else " ") + second
