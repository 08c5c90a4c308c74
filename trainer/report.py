"""A run's report: one HTML file that carries its figures and data and asks nothing of a network.

`render_report` turns what a run recorded into text, numbers and plots (`figures.py`), and
`report.html` lays them out. The same input gives the same bytes.

Anything may be missing: a run that failed, a model that was not evaluated, a loss that is not
finite. Such a value is shown as "—" and left out of the plots.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from penstock.trainer import figures
from penstock.trainer.figures import Series
from penstock.trainer.page import (
    MISSING,
    Card,
    count,
    duration,
    finite,
    number,
    percent,
    ratio,
    render,
    size,
    when,
)

TABLE_ROWS = 60  # at most, in the data table under a figure
MANY = 16
"""SAEs up to which each has its own curves; `sweep/` compares more of them."""
_SECTIONS = ("model", "dataset", "training", "controls", "environment")

# Field of a history point, title, note, whether y is logarithmic, whether 1 is its best value.
CURVES = (
    ("loss", "Loss", "What the optimiser sees, on a logarithmic scale", True, False),
    ("explained_variance", "Explained variance", "1 is perfect", False, True),
    ("l0", "L0", "Active features per row", False, False),
    (
        "dead_features",
        "Dead features",
        "Features that have not been active for a while",
        False,
        False,
    ),
)


def render_report(summary: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """The report of one run as a self-contained HTML page.

    `summary` and `history` are JSON values: times in Unix seconds, stages in seconds, sizes in
    bytes, shares between 0 and 1.
    """
    saes = [_quality(sae) for sae in _list(summary.get("saes"))]
    looks = _looks(saes)
    many = len(saes) > MANY
    return render(
        "report.html",
        many=many,
        run=summary.get("run"),
        summary=summary,
        **{key: _dict(summary.get(key)) for key in _SECTIONS},
        stages=_stages(summary),
        lead=_lead(summary, history),
        tiles=_tiles(summary, saes),
        saes=[(sae, look) for sae, look in zip(saes, looks, strict=True)],
        frontiers=[] if many else _frontiers(saes, looks),
        curve_groups=[] if many else _curve_groups(saes, looks, history),
        densities=[] if many else _densities(saes, looks),
        flow=_flow(summary, history),
    )


def _dict(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


# --- the parts of the page --------------------------------------------------------------------


def _quality(sae: dict[str, Any]) -> dict[str, Any]:
    """The SAE with `shown`: its quality on held-out rows or, not evaluated, as training saw it."""
    held_out = _dict(sae.get("held_out"))
    names = ("l0", "loss", "explained_variance", "ce_recovered")
    pairs = {name: finite(held_out.get(name)) for name in names}
    missing = [n for n in names if pairs[n] is None and finite(sae.get(n)) is not None]
    shown = pairs | {name: finite(sae[name]) for name in missing}
    # Training sees activations only: a cross-entropy always comes from an evaluation.
    trained = [name for name in missing if name != "ce_recovered"]
    place = " → ".join(str(sae[key]) for key in ("hook_name", "hook_out") if sae.get(key))
    return sae | {"held_out": held_out, "shown": shown, "from_training": trained, "place": place}


def _looks(saes: list[dict[str, Any]]) -> list[Series]:
    """Colour by SAE, dash pattern by hook, the same on the whole page."""
    hooks = list(dict.fromkeys(sae.get("place") for sae in saes))
    return [
        Series(
            str(sae.get("name")),
            i % figures.COLORS,
            hooks.index(sae.get("place")) % len(figures.DASHES),
            (),
        )
        for i, sae in enumerate(saes)
    ]


def _wall(summary: dict[str, Any]) -> float | None:
    """Seconds from the run's creation to its end."""
    start, end = finite(summary.get("created")), finite(summary.get("finished"))
    return end - start if start is not None and end is not None else None


def _stages(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages, each with its share of the longest and the part of it that was waiting."""
    stages = [_dict(stage) for stage in _list(summary.get("stages"))]
    longest = max((finite(stage.get("seconds")) or 0.0 for stage in stages), default=0.0)
    return [
        stage
        | {
            "length": ratio(stage.get("seconds"), longest),
            "waiting": ratio(stage.get("waiting_seconds"), stage.get("seconds")),
        }
        for stage in stages
    ]


def _lead(summary: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """The sentence about time: how far producing and training went on side by side."""
    produced, trained = _produced(summary), _trained(summary, history)
    wall = _wall(summary)
    took = f"The run took {duration(wall)}." if wall is not None else ""
    if produced and trained and (ahead := produced[-1][0] - trained[0][0]) > 0:
        return f"{took} Training began {duration(ahead)} before the last rows were produced.".strip()
    return took


def _tiles(summary: dict[str, Any], saes: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Label, value and remark of the key numbers."""
    training = _dict(summary.get("training"))
    dataset = _dict(summary.get("dataset"))
    stages = {stage.get("name"): stage for stage in _stages(summary)}
    train = _dict(stages.get("train"))
    speed = count(train.get("rows_per_second"))
    waiting = f"{percent(train['waiting'])} of the time waiting" if train.get("waiting") else "in training"

    def best(name: str, label: str) -> tuple[str, str, str]:
        known = [sae for sae in saes if sae["shown"][name] is not None]
        if not known:
            return label, MISSING, "not measured"
        top = max(known, key=lambda sae: sae["shown"][name])
        where = "in training" if name in top["from_training"] else "held out"
        rank = "best, " if len(saes) > 1 else ""
        return label, percent(top["shown"][name]), f"{rank}{top.get('name')}, {where}"

    return [
        (
            "Rows trained",
            count(training.get("rows")),
            f"{count(training.get('steps'))} steps of {count(training.get('batch_rows'))}",
        ),
        (
            "Activations stored",
            size(dataset.get("bytes")),
            f"bfloat16, {count(dataset.get('chunks'))} chunks",
        ),
        best("explained_variance", "Explained variance"),
        best("ce_recovered", "CE recovered"),
        ("Rows per second", speed, waiting if speed != MISSING else "not measured"),
        ("Wall time", duration(_wall(summary)), when(summary.get("finished"))),
    ]


def _frontiers(saes: list[dict[str, Any]], looks: list[Series]) -> list[Card]:
    cards = []
    for name, title, note in (
        (
            "explained_variance",
            "Explained variance",
            "against sparsity; the dashed line is perfect",
        ),
        ("ce_recovered", "CE recovered", "against sparsity; the dashed line is the model itself"),
    ):
        points, rows = [], []
        for sae, look in zip(saes, looks, strict=True):
            l0, y = sae["shown"]["l0"], sae["shown"][name]
            if l0 is None or y is None:
                continue
            family = f"{sae.get('place')} {sae.get('architecture')}"
            points.append((Series(look.name, look.color, look.dash, [(l0, y)]), family))
            rows.append([look.name, number(l0), number(y)])
        alt = f"{title} against L0. " + "; ".join(f"{r[0]}: {r[2]} at L0 {r[1]}" for r in rows)
        svg = figures.frontier(f"frontier {name}", alt, points)
        cards.append(Card(title, note, Markup(svg), ("SAE", "L0", title), rows))
    return cards


def _curve_groups(
    saes: list[dict[str, Any]], looks: list[Series], history: list[dict[str, Any]]
) -> list[tuple[str, list[Card]]]:
    """Training curves of all SAEs or, when colours would not do, of one hook at a time."""
    if len(saes) <= figures.COLORS:
        return [("", [_curve(which, looks, history) for which in CURVES])]
    groups = []
    for hook in dict.fromkeys(sae.get("place") for sae in saes):
        members = [
            Series(look.name, i % figures.COLORS, i // figures.COLORS % len(figures.DASHES), ())
            for i, (sae, look) in enumerate(zip(saes, looks, strict=True))
            if sae.get("place") == hook
        ]
        groups.append((str(hook), [_curve(which, members, history) for which in CURVES]))
    return groups


def _curve(
    which: tuple[str, str, str, bool, bool], looks: list[Series], history: list[dict[str, Any]]
) -> Card:
    name, title, note, log_y, unit_y = which

    def value(point: dict[str, Any], sae: str) -> float | None:
        return finite(_dict(_dict(point.get("saes")).get(sae)).get(name))

    timed = [(rows, p) for p in history if (rows := finite(p.get("rows"))) is not None]
    series = [
        Series(
            look.name,
            look.color,
            look.dash,
            [(rows, y) for rows, p in timed if (y := value(p, look.name)) is not None],
        )
        for look in looks
    ]
    ys = [y for s in series for _, y in s.points]
    if name == "l0" and ys and min(ys) > 0 and max(ys) > 8 * min(ys):
        log_y, note = True, f"{note}, on a logarithmic scale"
    if unit_y and figures.cut_at_zero(ys):
        note = f"{note}; the view ends at 0, the first steps lie below"
    ends = [
        f"{s.name} from {number(s.points[0][1])} to {number(s.points[-1][1])}" for s in series if s.points
    ]
    alt = f"{title} over rows trained. " + "; ".join(ends)
    svg = figures.curves(f"curve {name} {looks[0].name}" if looks else name, alt, series,
                         log_y=log_y, unit_y=unit_y)  # fmt: skip
    return Card(
        title,
        note,
        Markup(svg),
        ("Rows", "Step", *(look.name for look in looks)),
        [
            [count(rows), count(p.get("step")), *(number(value(p, look.name)) for look in looks)]
            for rows, p in figures.sampled(timed, TABLE_ROWS)
        ],
        [(s.name, f"--s{s.color}", figures.DASHES[s.dash]) for s in series],
    )


def _densities(saes: list[dict[str, Any]], looks: list[Series]) -> list[Card]:
    cards: list[Card] = []
    for sae, look in zip(saes, looks, strict=True):
        data = _dict(sae.get("density"))
        edges = [finite(edge) for edge in _list(data.get("log10_edges"))]
        counts = [finite(n) or 0.0 for n in _list(data.get("counts"))]
        known = [edge for edge in edges if edge is not None]
        if len(known) != len(counts) + 1:
            continue
        never = finite(data.get("never_active")) or 0.0
        alt = (
            f"Histogram of how often the features of {look.name} are active: "
            f"{count(sum(counts))} features active at least once, {count(never)} never"
        )
        color = figures.series_color(look.color)
        svg = figures.density(f"density {len(cards)}", alt, color, known, counts, never)
        rows = [["never", "never", count(never)]] + [
            [f"{10**low:.2g}", f"{10**high:.2g}", count(n)]
            for low, high, n in zip(known[:-1], known[1:], counts, strict=True)
        ]
        total = count(sum(counts) + never)
        note = f"{sae.get('place')}: {total} features, {count(never)} never active"
        cards.append(
            Card(
                look.name,
                note,
                Markup(svg),
                ("Share of rows, from", "to", "Features"),
                figures.sampled(rows, TABLE_ROWS),
            )
        )
    return cards


def _origin(summary: dict[str, Any]) -> float | None:
    """The Unix time from which the flow figure counts."""
    return finite(_dict(summary.get("timeline")).get("start"))


def _pairs(raw: Sequence[tuple[object, object]], origin: float | None) -> list[tuple[float, float]]:
    """(seconds since `origin`, rows) of the pairs that are finite, in order of time."""
    points = [(finite(t), finite(rows)) for t, rows in raw]
    known = sorted((t, rows) for t, rows in points if t is not None and rows is not None)
    return [(t - (origin or 0.0), rows) for t, rows in known]


def _produced(summary: dict[str, Any]) -> list[tuple[float, float]]:
    chunks = _list(_dict(summary.get("timeline")).get("chunks"))
    return _pairs([(c[0], c[1]) for c in chunks if len(c) == 2], _origin(summary))


def _trained(summary: dict[str, Any], history: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return _pairs([(p.get("time"), p.get("rows")) for p in history], _origin(summary))


def _flow(summary: dict[str, Any], history: list[dict[str, Any]]) -> Card:
    produced, trained = _produced(summary), _trained(summary, history)
    if _origin(summary) is None:  # count from the first thing that is known to have happened
        first = min((x for x, _ in [*produced, *trained]), default=0.0)
        produced = [(x - first, y) for x, y in produced]
        trained = [(x - first, y) for x, y in trained]
    elif produced:
        produced = [(0.0, 0.0), *produced]
    alt = "Cumulative rows over time. " + "; ".join(
        f"{name}: {count(line[-1][1])} rows after {duration(line[-1][0])}"
        for name, line in (("committed by producers", produced), ("trained", trained))
        if line
    )
    both = [("committed", *p) for p in produced] + [("trained", *p) for p in trained]
    return Card(
        "Producing and training",
        "Cumulative rows; shaded while both went on",
        Markup(figures.flow("flow", alt, produced, trained)),
        ("Event", "Seconds", "Rows"),
        [
            [name, f"{seconds:,.1f}", count(rows)]
            for name, seconds, rows in figures.sampled(sorted(both, key=lambda b: b[1]), TABLE_ROWS)
        ],
        [("committed by producers", "--produced", ""), ("trained", "--trained", "")],
    )
