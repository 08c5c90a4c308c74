"""A plan in words and columns."""

from collections.abc import Iterator, Sequence

from penstock.deploy.plan.record import Plan


def plan_lines(plan: Plan) -> Iterator[str]:
    """`penstock plan` for people."""
    about = "about " if plan.estimated else ""
    yield f"dataset {plan.url}"
    yield f"  {about}{plan.rows:,} rows in {plan.chunks:,} chunks of {plan.sequences_per_chunk} sequences"
    if plan.committed:
        yield f"  {plan.committed:,} chunks are there already"
    table = [("", "d_in", "bytes", "objects")]
    for name, hook in plan.hooks.items():
        table.append((name, f"{hook['d_in']:,}", f"{hook['bytes']:,}", f"{hook['objects']:,}"))
    for name, part in [*plan.parts.items(), ("in all", plan.total)]:
        if name != "activations":
            table.append((name, "", f"{part['bytes']:,}", f"{part['objects']:,}"))
    yield from _columns(table)
    if plan.at_once is not None:
        yield f"  of the chunks at most {plan.at_once:,} bytes at a time"
    yield from _memory(plan)
    yield from _time(plan)
    yield from _costs(plan)
    for note in plan.notes:
        yield f"note: {note}"


def _memory(plan: Plan) -> Iterator[str]:
    yield ""
    yield "memory per process"
    table = []
    for name, size in plan.memory.items():
        gpu = f"{plan.device_memory[name] / 1e9:,.2f} GB of its GPU" if name in plan.device_memory else ""
        times = f"× {plan.processes[name]}" if name in plan.processes else ""
        table.append((name, times, f"{size / 1e9:,.2f} GB", gpu))
    for name, size in plan.free_memory.items():
        table.append((f"free ({name})", "", f"{size / 1e9:,.2f} GB", ""))
    yield from _columns(table)


def _time(plan: Plan) -> Iterator[str]:
    if not plan.seconds:
        return
    yield ""
    yield "time, if everything runs on this machine and nothing else does"
    table = [(name, seconds_in_words(value)) for name, value in plan.seconds.items()]
    yield from _columns([(*row, "") for row in table])
    yield "  producing and training overlap"
    for name, rate in plan.rates.items():
        yield f"  {name}: {rate:,.0f} rows/s"


def _costs(plan: Plan) -> Iterator[str]:
    costs = plan.costs
    if not costs:
        return
    yield ""
    yield "cost"
    if "storing" in costs:
        yield f"  storing the dataset for {costs['months']:g} months: {costs['storing']:,.4g}"
    if "making once" in costs:
        yield f"  making its rows once: {costs['making once']:,.4g} ({costs['producer hours']:,.3g} hours)"
    if "stored" in costs:
        yield (
            f"  the config's {costs['passes']:g} passes: {costs['stored']:,.4g} stored, "
            f"{costs['made again']:,.4g} if the rows are made again for each"
        )
        yield f"  storing pays off from {costs['pays off from passes']:g} passes on"


def seconds_in_words(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _columns(table: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for first, *others in table:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield ("  " + "  ".join(cells)).rstrip()
