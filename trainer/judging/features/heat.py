"""Features in context as HTML: a card each, with text whose tokens are shaded by the activation."""

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from penstock.trainer.page import number, percent, render

_SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥", " ": "·"}
"""White space as it is shown."""
_RUN = 4
"""Equal signs of white space up to which each is shown."""
_HEIGHT = 34
"""Of a histogram, in its own units; a bar is 5 wide."""


def feature_cards(one: dict[str, Any]) -> Markup:
    """The features of a dictionary, as `contexts.measure` records them."""
    return Markup(render("features.html", features=[_card(feature) for feature in one["features"]]))


def visible(text: str) -> str:
    """Text with its white space shown: `↵` for a line's end, `·` for a space, `·×8` for eight of them."""
    out, at = [], 0
    while at < len(text):
        sign = _SIGNS.get(text[at])
        if sign is None:
            out.append(
                text[at]
                if text[at].isprintable()
                else "␣"
                if text[at].isspace()
                else "\N{REPLACEMENT CHARACTER}"
            )
            at += 1
            continue
        run = len(text[at:]) - len(text[at:].lstrip(text[at]))
        out.append(sign * run if run <= _RUN else f"{sign}×{run}")
        at += run
    return "".join(out)


def _card(feature: dict[str, Any]) -> dict[str, Any]:
    largest = feature["max"] or 1.0
    histogram = feature["histogram"]
    counts = histogram["counts"]
    zero = feature["share"]
    return {
        "number": feature["feature"],
        "band": feature["band"],
        "share": percent(zero) if zero is None or zero >= 0.001 else f"{number(100 * zero)} %",
        "mean": number(feature["mean_active"]),
        "max": number(feature["max"]),
        "bars": _bars(counts),
        "width": 5 * len(counts),
        "height": _HEIGHT,
        "ends": [number(histogram["edges"][i]) for i in (0, -1)] if counts else [],
        "told": f"Histogram of activations: {sum(counts):,} rows active, {histogram['zero']:,} not",
        "promotes": _tokens(feature["promotes"]),
        "suppresses": _tokens(feature["suppresses"]),
        "examples": [_example(example, largest) for example in feature["examples"]],
    }


def _bars(counts: list[int]) -> list[tuple[int, str, str]]:
    """(x, y, height) of each bar; a bar that is not empty can be seen."""
    tallest = max(counts, default=0)
    heights = [max(1.0, _HEIGHT * count / tallest) if count else 0.0 for count in counts]
    return [(5 * i, f"{_HEIGHT - h:.1f}", f"{h:.1f}") for i, h in enumerate(heights)]


def _tokens(found: list[dict[str, Any]] | None) -> list[tuple[str, str]] | None:
    """(token, what its logit gains per unit of activation) of each."""
    return None if found is None else [(visible(t["text"]), number(t["logit"])) for t in found]


def _example(example: dict[str, Any], largest: float) -> dict[str, Any]:
    return {
        "activation": number(example["activation"]),
        "where": f"sequence {example['sequence']}, position {example['position']}",
        "spans": list(_spans(example, largest)),
    }


def _spans(example: dict[str, Any], largest: float) -> Iterator[dict[str, Any]]:
    """Tokens with what they are shaded by; what the feature is not active on is plain text, in one piece."""
    plain = ""
    for place, (text, activation) in enumerate(zip(example["texts"], example["activations"], strict=True)):
        kind = "at" if place == example["at"] else "absent" if activation is None else "t"
        if kind == "t" and not activation:
            plain += visible(text)
            continue
        if plain:
            yield {"kind": "", "text": plain}
            plain = ""
        yield {
            "text": visible(text),
            "heat": f"{100 * min(1.0, (activation or 0.0) / largest):.0f}%",
            "told": "no row" if activation is None else number(activation),
            "kind": kind,
        }
    if plain:
        yield {"kind": "", "text": plain}
