"""`inspect --mixing`: how well rows are mixed in a trainer's batches, said in words and figures."""

from collections.abc import Iterator, Sequence

from penstock.store.dataset import Dataset, open_dataset
from penstock.store.joined import JoinedDataset
from penstock.store.mixing import HookMixing, Mixing, Pairs, chance_autocorrelation, measure_mixing
from penstock.store.order import ReadingOrder
from penstock.trainer.config import RunSettings

TOLERANCE = 1.1
SHOWN_LAGS = (1, 2, 4, 8)


def mixing_report(
    url: str,
    window_chunks: int | None = None,
    batch_rows: int | None = None,
    seed: int | None = None,
    hooks: Sequence[str] = (),
) -> tuple[list[str], bool]:
    """The report, and whether the rows are shuffled as they are meant to be.

    Args:
        window_chunks, batch_rows, seed: of the run; its defaults if None.
        hooks: hook points whose rows are looked at; all of them by default.
    """
    dataset = open_dataset(url)
    names = list(hooks) or [hook.name for hook in dataset.manifest.hooks]
    order = ReadingOrder(
        sizes=(dataset.n_chunks,),
        epochs=1,
        window_chunks=window_chunks or JoinedDataset([dataset]).default_window(names),
        seed=_default("seed") if seed is None else seed,
    )
    mixing = measure_mixing(dataset, order, batch_rows or _default("batch_rows"), names)
    wrong = list(faults(mixing))
    return [
        *_lines(dataset, mixing),
        "",
        *(wrong or ["rows are shuffled as they are meant to be"]),
    ], not wrong


def _default(name: str) -> int:
    return int(RunSettings.model_fields[name].default)


def faults(mixing: Mixing) -> Iterator[str]:
    """What is not shuffled, one sentence each."""
    if mixing.in_batches.too_many:
        yield (
            "NOT SHUFFLED: batches hold "
            f"{_times(mixing.in_batches)} as many pairs of one sequence as a shuffle of the window would give"
        )
    if mixing.as_stored.too_many:
        yield (
            "NOT SHUFFLED: in stored order, neighbours are of one sequence "
            f"{_times(mixing.as_stored)} as often as in a shuffled chunk; tools that read rows in stored "
            "order get whole sequences"
        )
    for name, hook in mixing.hooks.items():
        if hook.drifts:
            yield (
                f"NOT SHUFFLED: at {name} chunks differ {hook.drift:.1f} times as much as chunks of randomly "
                "drawn sequences would; the corpus was not permuted"
            )
        elif _beyond_sequences(mixing, hook):
            yield (
                f"NOT SHUFFLED: at {name} neighbours in a batch correlate ({hook.rows[0]:.3f}) more than "
                "rows of a shuffled window do"
            )


def _beyond_sequences(mixing: Mixing, hook: HookMixing) -> bool:
    chance, deviation = chance_autocorrelation(hook.n_rows, 1)
    allowed = mixing.in_batches.expected_rate * hook.sequence_correlation
    return bool(hook.rows[0] > chance + 2 * allowed + 0.01 + 5 * deviation)


def _times(pairs: Pairs) -> str:
    return f"{pairs.rate / pairs.expected_rate:,.1f} times" if pairs.expected else "infinitely"


def _lines(dataset: Dataset, mixing: Mixing) -> Iterator[str]:
    order, whole = mixing.order, mixing.dataset
    about = "" if mixing.exact else "about "
    yield f"mixing of {dataset.url}"
    yield (f"  {whole.rows:,} rows of {about}{whole.sequences:,} sequences in {order.n_chunks:,} chunks")
    yield (
        f"  read as a run does: windows of {order.window_chunks} chunks, batches of {mixing.batch_rows:,}, "
        f"seed {order.seed}; {mixing.windows} of {order.windows_per_epoch} windows measured"
    )
    yield ""
    yield from _pair_lines(mixing)
    for name, hook in mixing.hooks.items():
        yield ""
        yield from _hook_lines(mixing, name, hook)
    yield ""
    yield from _window_lines(dataset, mixing)


def _pair_lines(mixing: Mixing) -> Iterator[str]:
    pairs, mates = mixing.in_batches, mixing.batch_rows - 1
    yield f"  {'two rows of a batch are of one sequence':<42}{'rate':>11}{'per row':>9}{'measured ÷ it':>15}"
    for name, rate, ratio in (
        ("measured", pairs.rate, None),
        ("perfect shuffle of each window", pairs.expected_rate, _ratio(pairs.rate, pairs.expected_rate)),
        ("perfect shuffle of the whole dataset", mixing.dataset.rate, mixing.against_dataset),
    ):
        line = f"    {name:<40}{rate:>11.4%}{mates * rate:>9.2f}"
        yield line if ratio is None else f"{line}{ratio:>15.3f}   {_within(ratio)}"
    stored = mixing.as_stored
    yield f"  {'neighbours in stored order':<42}{stored.rate:>11.4%}"
    yield (
        f"    {'perfect shuffle of each chunk':<40}{stored.expected_rate:>11.4%}{'':>9}"
        f"{_ratio(stored.rate, stored.expected_rate):>15.3f}"
    )


def _within(ratio: float) -> str:
    return "within 10 %" if 1 / TOLERANCE <= ratio <= TOLERANCE else "NOT within 10 %"


def _ratio(measured: float, perfect: float) -> float:
    return measured / perfect if perfect else 1.0


def _hook_lines(mixing: Mixing, name: str, hook: HookMixing) -> Iterator[str]:
    yield f"  {name}: autocorrelation of a fixed random projection" + "".join(
        f"{f'lag {lag}':>10}" for lag in SHOWN_LAGS
    )
    width = len(name) + 48
    for label, values, n in (
        (f"along {hook.n_rows:,} rows", hook.rows, hook.n_rows),
        (f"along {hook.n_batches:,} batch means", hook.batches, hook.n_batches),
    ):
        yield f"    {label}".ljust(width) + "".join(f"{values[lag - 1]:>10.4f}" for lag in SHOWN_LAGS)
        chances = [chance_autocorrelation(n, lag) for lag in SHOWN_LAGS]
        yield f"    perfect shuffle, ± {2 * chances[0][1]:.4f}".ljust(width) + "".join(
            f"{mean:>10.4f}" for mean, _ in chances
        )
    here = mixing.effective_rows(mixing.in_batches.rate, hook)
    yield (
        f"    two rows of one sequence correlate by {hook.sequence_correlation:.3f}, so the mean of "
        f"{mixing.batch_rows:,} rows"
    )
    yield f"    in a batch varies like one over {here:,.0f} rows drawn from the whole dataset"
    yield f"    chunks differ {hook.drift:.2f} times as much as if their sequences were drawn at random"


def _window_lines(dataset: Dataset, mixing: Mixing) -> Iterator[str]:
    order = mixing.order
    size_here = min(order.window_chunks, order.n_chunks)
    yield f"  {'window_chunks':>15}{'rows mixed':>14}{'rate ÷ dataset':>18}{'MB in memory':>15}"
    for size, rate in mixing.window_rates.items():
        rows, megabytes = _window_size(dataset, size)
        line = f"  {size:>15,}{rows:>14,}{_ratio(rate, mixing.dataset.rate):>18.3f}{megabytes:>15,.0f}"
        yield line + ("   <- measured" if size == size_here else "")
    yield "  one window, all hooks; a trainer holds up to three"
    yield ""
    yield _against_dataset(dataset, mixing)


def _window_size(dataset: Dataset, chunks: int) -> tuple[int, float]:
    """Rows and megabytes of a window."""
    manifest = dataset.manifest
    rows = round(manifest.total_rows / manifest.n_chunks * chunks)
    return rows, rows * sum(2 * hook.d_in for hook in manifest.hooks) / 1e6


def _against_dataset(dataset: Dataset, mixing: Mixing) -> str:
    ratio = mixing.against_dataset
    if ratio <= TOLERANCE:
        return "against a shuffle of the whole dataset: within 10 %"
    needed = _window_size(dataset, mixing.within)[1]
    return (
        f"against a shuffle of the whole dataset: NOT within 10 %, batches hold {ratio:.1f} times as many "
        f"pairs of one sequence; window_chunks: {mixing.within} would do, at {needed:,.0f} MB per window"
    )
