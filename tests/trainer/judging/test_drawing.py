"""Which dictionaries share a figure, and that a figure of many positions stays small."""

import math

from penstock.trainer.judging.drawing import PER_FIGURE, Line, by_position, in_common, shared_out


def names_and_hooks(kinds: dict[str, list[int]]) -> tuple[list[str], list[str]]:
    pairs = [(f"layer{n}-{kind}", f"blocks.{n}.out") for kind, layers in kinds.items() for n in layers]
    return [name for name, _ in pairs], [hook for _, hook in pairs]


def test_nobody_stands_alone_in_a_second_figure() -> None:
    names, hooks = names_and_hooks({"topk": [0, 1, 2, 3, 4, 5], "l1": [0, 2, 5]})
    shares = shared_out(names, hooks)
    assert [[names[i] for i, _ in share] for share in shares] == [names[:6], names[6:]]
    # a layer has its colour in all figures
    assert [color for _, color in shares[1]] == [0, 2, 5]
    assert [in_common([names[i] for i, _ in share]) for share in shares] == ["topk", "l1"]
    for share in shared_out([f"k{i}" for i in range(9)], ["one place"] * 9):
        assert len(share) in (4, 5)
        assert len({color for _, color in share}) == len(share)
    twelve = ["one place"] * 6 + ["another"] * 6
    assert [len(share) for share in shared_out(list("abcdefghijkl"), twelve)] == [6, 6]
    assert shared_out(["a"] * PER_FIGURE, ["p"] * PER_FIGURE) == [[(i, i) for i in range(PER_FIGURE)]]


def test_eight_lines_over_many_positions_stay_small() -> None:
    def line(i: int) -> Line:
        means = [2 + i + math.sin(i + p / 3) for p in range(256)]
        return Line(f"dictionary-{i}", means, [0.1] * 256, i)

    svg = by_position("small", "eight lines", [line(i) for i in range(8)], 64, 256)
    assert len(svg) < 70_000
    assert svg.count("dictionary-") == 8
