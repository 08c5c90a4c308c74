"""Figures in few characters: the same points, the same order, nothing that shines through lost."""

import re

from penstock.trainer.figures import Series, dots, draw, frontier
from penstock.trainer.svg import GRAIN, inline, short_path


def points(d: str) -> list[tuple[float, float]]:
    """Where a path of M, l, z and h0 goes."""
    found: list[tuple[float, float]] = []
    letter, numbers = "", list[float]()
    for token in re.findall(r"[A-Za-z]|-?(?:\d+\.?\d*|\.\d+)", d):
        if token.isalpha():
            letter = token
            continue
        numbers.append(float(token))
        if letter == "h":
            assert numbers.pop() == 0
        elif len(numbers) == 2:
            x, y = numbers
            numbers.clear()
            found.append((x, y) if letter == "M" else (found[-1][0] + x, found[-1][1] + y))
    return found


def test_a_short_path_goes_where_the_long_one_does() -> None:
    truth = [(44.123456, 10.0), (44.953456, 9.87654321), (45.013456, 120.5), (380.0, -0.04)]
    truth += [(380 - 0.23456 * i, 17.777 * (i % 7)) for i in range(1, 501)]
    long = "M " + "\nL ".join(f"{x} {y}" for x, y in truth) + "\nz\n"
    short = short_path(long)
    assert len(short) < len(long) / 2
    found = points(short)
    assert len(found) == len(truth)
    # rounded where they are: errors do not add up
    for (x, y), (u, v) in zip(truth, found, strict=True):
        assert abs(x - u) <= 0.5001 / GRAIN
        assert abs(y - v) <= 0.5001 / GRAIN
    assert short_path("M 1 2 \nL 1 2 \nM 3.5 4 \nL 3.5 4 \n") == "M1 2h0M3.5 4h0"
    curve = "M 0 1.5 \nC 0.397805 1.5 0.77 1.34 1.06 1.06 \nz\n"
    assert short_path(curve).startswith("M 0 1.5 \nC 0.39 1.5")


def test_neighbours_become_one_unless_they_shine_through() -> None:
    def page(style: str) -> str:
        group = f'<g id="patch_{{}}">\n<path d="M 0 0 \nL 1 1 \n" style="{style}"/>\n</g>\n'
        return inline(f"<svg>{group * 3}</svg>", "three", 10, 10)

    assert page("fill: red").count("<path") == 1
    assert page("fill: red").count("M0 0l1 1") == 3
    assert page("fill: red; opacity: 0.5").count("<path") == 3


def test_a_cloud_of_dots_is_small_and_complete() -> None:
    cloud = [(i % 71, (i * 37) % 53) for i in range(1000)]

    def paint(ax: object) -> None:
        dots(ax, cloud, "#a20000", 2.0)  # type: ignore[arg-type]
        ax.set_xlim(0, 71)  # type: ignore[attr-defined]
        ax.set_ylim(0, 53)  # type: ignore[attr-defined]

    svg = draw("cloud", "a cloud", paint)
    assert svg.count("h0") == 1000
    assert len(svg) < 25_000


def test_names_of_points_on_one_heap_do_not_cover_each_other() -> None:
    heap = [(Series(f"layer{i}-topk", i, 0, [(32.0, 0.96 + 0.004 * i)]), f"f{i}") for i in range(6)]
    far = [(Series("layer0-l1", 6, 0, [(76.0, 0.7)]), "far")]
    svg = frontier("heap", "a heap", heap + far)
    texts = re.findall(r'<text style="([^"]*)" x="([\d.-]+)" y="([\d.-]+)">(layer[^<]*)<', svg)
    boxes = {}
    for style, x, y, name in texts:
        width = 6.0 * len(name)
        left = float(x) - (width / 2 if "middle" in style else width if "end" in style else 0)
        boxes[name] = (left, float(y) - 5, left + width, float(y) + 5)
    assert len(boxes) == 7
    assert all(box[0] >= 0 and box[2] <= 380 and box[1] >= 0 and box[3] <= 220 for box in boxes.values())
    names = sorted(boxes)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            a, b = boxes[one], boxes[other]
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (one, other)
    # in the order of the points, the highest above
    assert [boxes[f"layer{i}-topk"][1] for i in range(6)] == sorted(
        (boxes[f"layer{i}-topk"][1] for i in range(6)), reverse=True
    )
