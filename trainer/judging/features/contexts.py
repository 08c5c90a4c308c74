"""Features in context: where they are most active, how strongly at all, and what they do to the next token.

Rows are those stored for training, some chunks of them; where chunks are deleted once they are read, the
held-out text is run through the model instead. Rows of special tokens do not count.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.common.errors import ConfigError
from penstock.common.model.files import LoadedTokenizer
from penstock.store.joined import JoinedDataset
from penstock.trainer.judging.features.heat import feature_cards
from penstock.trainer.judging.features.rows import ABSENT, Piece, Rows, StoredRows, TextRows, readable_chunks
from penstock.trainer.judging.features.strongest import Activity, draw
from penstock.trainer.judging.settings import ContextSettings
from penstock.trainer.judging.shown import Shown
from penstock.trainer.judging.splicing.dictionaries import Dictionary
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.sae import SAE

SPECIAL = "[special]"
"""Stands in text for a token without a row."""

_ACTS_AT_ONCE = 1 << 24
"""Feature activations held at a time, in values."""
_PIECE = 1 << 32
"""Places are numbered piece · _PIECE + row."""

Progress = Callable[[int, int], None]


def source_of(subject: Subject, data: JoinedDataset, settings: ContextSettings) -> dict[str, Any]:
    """What rows are read, as JSON.

    Raises:
        ConfigError: a feature that was asked for does not exist.
        UserError: no row is stored yet.
    """
    for one in subject.dictionaries:
        _asked(one, settings)
    chunks = readable_chunks(data, settings.max_chunks)
    return {"datasets": [part.manifest.digest for part in data.parts], "chunks": chunks}


def measure(
    subject: Subject,
    data: JoinedDataset,
    tokenizer: LoadedTokenizer,
    settings: ContextSettings,
    progress: Progress,
) -> dict[str, Any]:
    """For some features of each dictionary: activity, strongest tokens with their context, next tokens.

    Memory: one chunk (or one batch of text), a histogram and a few places per feature.

    Returns:
        {dictionary: {"l0", "source", "features": [{"feature", "band", "fired", "share", …}], …}}.

    Raises:
        ConfigError: a feature that was asked for does not exist.
        ObjectMissing, DamagedObject: a chunk is not there, or not whole.
    """
    chunks = readable_chunks(data, settings.max_chunks)
    rows: Rows = StoredRows(data, chunks, subject.model.device) if chunks else TextRows(subject)
    record = {}
    for number, one in enumerate(subject.dictionaries):
        share = _part_of(progress, number, len(subject.dictionaries))
        record[one.name] = _measure(subject, one, rows, tokenizer, settings, share)
    return record


def _measure(
    subject: Subject,
    one: Dictionary,
    rows: Rows,
    tokenizer: LoadedTokenizer,
    settings: ContextSettings,
    progress: Progress,
) -> dict[str, Any]:
    asked = _asked(one, settings)
    numbers = rows.numbers()
    activity = Activity(one.module.d_sae, settings.examples, subject.model.device)
    for done, number in enumerate(numbers):
        acts = rows.read(number, one.hook_name).acts
        for start, part in _encoded(one, acts):
            activity.add(part, number * _PIECE + start)
        progress(done + 1, 2 * len(numbers))
    if asked is None:
        wanted = draw(activity.fired, settings.of_each, settings.seed, one.name)
    else:
        wanted = [(feature, "asked for") for feature in dict.fromkeys(asked)]
    examples = _examples(one, rows, activity, [f for f, _ in wanted], tokenizer, settings, progress)
    speaks = _next_tokens(subject, one, [f for f, _ in wanted], tokenizer, settings.tokens)
    count = max(1, activity.rows)
    return {
        "hook_name": one.hook_name,
        "hook_out": one.hook_out,
        "d_sae": one.module.d_sae,
        "l0": float(activity.fired.sum()) / count,
        "source": rows.about() | {"rows": activity.rows},
        "never_active": int((activity.fired == 0).sum()),
        "features": [
            _activity_of(activity, feature)
            | {"band": band, "examples": examples[feature]}
            | speaks.get(feature, {"promotes": None, "suppresses": None})
            for feature, band in wanted
        ],
    }


def _asked(one: Dictionary, settings: ContextSettings) -> list[int] | None:
    """The features that settings ask for; None where they leave it to a draw."""
    asked = settings.features.get(one.name)
    for feature in asked or ():
        if not 0 <= feature < one.module.d_sae:
            raise ConfigError(
                f"evaluation.contexts.features: {one.name} has no feature {feature}; it has 0 to "
                f"{one.module.d_sae - 1}"
            )
    return asked


def _encoded(one: Dictionary, acts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, feature activations) of rows, as many at a time as fit."""
    at_once = max(1, _ACTS_AT_ONCE // max(1, one.module.d_sae))
    with torch.no_grad():
        for start in range(0, len(acts), at_once):
            yield start, one.module.encode(acts[start : start + at_once])


def _activity_of(activity: Activity, feature: int) -> dict[str, Any]:
    fired, rows = int(activity.fired[feature]), activity.rows
    edges, counts = activity.histogram_of(feature)
    return {
        "feature": feature,
        "fired": fired,
        "share": fired / rows if rows else None,
        "mean_active": float(activity.total[feature]) / fired if fired else None,
        "max": float(activity.values[feature, 0]) if fired else None,
        "histogram": {"edges": edges, "counts": counts, "zero": rows - fired},
    }


def _examples(
    one: Dictionary,
    rows: Rows,
    activity: Activity,
    features: Sequence[int],
    tokenizer: LoadedTokenizer,
    settings: ContextSettings,
    progress: Progress,
) -> dict[int, list[dict[str, Any]]]:
    """The strongest places of some features, with the text around them and how active it is."""
    by_piece: dict[int, list[tuple[int, int, int]]] = {}
    for feature in features:
        for rank, place in enumerate(activity.places[feature].tolist()):
            if activity.values[feature, rank] > 0:
                by_piece.setdefault(place // _PIECE, []).append((feature, rank, place % _PIECE))
    found: dict[int, dict[int, dict[str, Any]]] = {feature: {} for feature in features}
    numbers = list(rows.numbers())
    for number in sorted(by_piece):
        piece = rows.read(number, one.hook_name)
        spans = [piece.around(row, settings.before, settings.after) for _, _, row in by_piece[number]]
        needed = np.unique(np.concatenate([span for span, _ in spans]))
        needed = needed[needed != ABSENT]
        columns = torch.tensor(features, device=piece.acts.device)
        acts = torch.cat(
            [part[:, columns].cpu() for _, part in _encoded(one, piece.acts[torch.from_numpy(needed)])]
        ).numpy()
        for (feature, rank, row), (span, at) in zip(by_piece[number], spans, strict=True):
            around = acts[np.searchsorted(needed, span).clip(max=len(needed) - 1), features.index(feature)]
            value = float(activity.values[feature, rank])
            found[feature][rank] = _example(piece, row, span, at, value, around, tokenizer)
        progress(len(numbers) + numbers.index(number) + 1, 2 * len(numbers))
    progress(2 * len(numbers), 2 * len(numbers))
    return {feature: [ranked[rank] for rank in sorted(ranked)] for feature, ranked in found.items()}


def _example(
    piece: Piece,
    row: int,
    span: npt.NDArray[np.int64],
    at: int,
    value: float,
    around: npt.NDArray[np.float32],
    tokenizer: LoadedTokenizer,
) -> dict[str, Any]:
    """`around`: how active the feature is on each row of the span."""
    ids = [None if r == ABSENT else int(piece.tokens[r]) for r in span]
    return {
        "activation": value,
        "sequence": int(piece.sequence[row]),
        "position": int(piece.position[row]),
        "at": at,
        "tokens": ids,
        "texts": [SPECIAL if number is None else token_text(tokenizer, number) for number in ids],
        "activations": [
            None if r == ABSENT else max(0.0, float(value)) for r, value in zip(span, around, strict=True)
        ],
    }


def _next_tokens(
    subject: Subject, one: Dictionary, features: Sequence[int], tokenizer: LoadedTokenizer, count: int
) -> dict[int, dict[str, Any]]:
    """Feature -> the tokens that its direction promotes and suppresses; empty without a direct path."""
    if not isinstance(one.module, SAE) or not features:
        return {}
    directions = one.module.directions().detach()[torch.tensor(features, device=subject.model.device)]
    logits = subject.model.direct_logits(directions, one.hook_out)
    if logits is None:
        return {}
    return {
        feature: {
            name: [
                {"token": token, "text": token_text(tokenizer, token), "logit": value}
                for value, token in _largest(line, count, largest)
            ]
            for name, largest in (("promotes", True), ("suppresses", False))
        }
        for feature, line in zip(features, logits, strict=True)
    }


def _largest(line: Tensor, count: int, largest: bool) -> list[tuple[float, int]]:
    values, tokens = line.sort(descending=largest, stable=True)
    return list(zip(values[:count].tolist(), tokens[:count].tolist(), strict=True))


def token_text(tokenizer: LoadedTokenizer, token: int) -> str:
    """One token as text; bytes that are no character by themselves show as U+FFFD."""
    text = tokenizer.tokenizer.decode([token], skip_special_tokens=False)
    # some decoders drop the space that a text's first word does not need
    piece = tokenizer.tokenizer.id_to_token(token)
    return f" {text}" if piece is not None and piece.startswith("▁") and not text.startswith(" ") else text


def _part_of(progress: Progress, number: int, count: int) -> Progress:
    """Progress of one of several equal parts."""
    return lambda done, total: progress(number * total + done, count * total)


def show(record: dict[str, Any]) -> list[Shown]:
    """Of each dictionary: its features in context, their activity, and their histograms."""
    return [shown for name, one in record.items() for shown in _show(name, one)]


def _show(name: str, one: dict[str, Any]) -> list[Shown]:
    source, features = one["source"], one["features"]
    if source["what"] == "stored rows":
        where = f"{source['chunks']} of the {source['of_chunks']} chunks that are stored"
    else:
        where = f"{source['sequences']} sequences of held-out text"
    note = (
        f"{one['hook_name']}; L0 {one['l0']:.1f}; {one['never_active']:,} of {one['d_sae']:,} features never "
        f"active. Over {source['rows']:,} rows, {where}"
    )
    examples: list[list[object]] = [
        [f["feature"], f["band"], rank, e["activation"], e["sequence"], e["position"],
         *("".join(e["texts"][part]) for part in _sides(e["at"]))]
        for f in features
        for rank, e in enumerate(f["examples"], start=1)
    ]  # fmt: skip
    table: list[list[object]] = [
        [f["feature"], f["band"], f["fired"], f["share"], f["mean_active"], f["max"],
         *(_quoted(f[key]) for key in ("promotes", "suppresses"))]
        for f in features
    ]  # fmt: skip
    bars: list[list[object]] = [
        [f["feature"], *bar]
        for f in features
        for bar in [
            (None, None, f["histogram"]["zero"]),
            *zip(
                f["histogram"]["edges"], f["histogram"]["edges"][1:], f["histogram"]["counts"], strict=False
            ),
        ]
    ]
    return [
        Shown(
            f"contexts-{name}",
            name,
            note,
            ["Feature", "Band", "Rank", "Activation", "Sequence", "Position", "Before", "Token", "After"],
            examples,
            feature_cards(one),
        ),
        Shown(
            f"contexts_features-{name}",
            f"{name}: activity",
            "Share: of all rows. Mean: over rows on which a feature is active",
            ["Feature", "Band", "Rows", "Share", "Mean", "Largest", "Promotes", "Suppresses"],
            table,
            folded=True,
        ),
        Shown(
            f"contexts_histograms-{name}",
            f"{name}: histograms",
            "Rows by activation, two bins to a doubling; those on which a feature is not active stand first",
            ["Feature", "From", "To", "Rows"],
            bars,
            folded=True,
        ),
    ]


def _quoted(tokens: list[dict[str, Any]] | None) -> str | None:
    return None if tokens is None else " ".join(repr(token["text"]) for token in tokens)


def _sides(at: int) -> tuple[slice, slice, slice]:
    return slice(0, at), slice(at, at + 1), slice(at + 1, None)
