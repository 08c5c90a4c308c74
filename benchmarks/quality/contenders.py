"""Who takes part."""

from dataclasses import dataclass

OURS = "penstock"


@dataclass(frozen=True)
class Contender:
    """A kind as a library has it.

    Attributes:
        first: coefficient to begin with, where there is one; else it is told the wanted L0.
        rows: which rows it is trained on, of `rows.HOOKS`.
    """

    kind: str
    library: str
    as_called_there: str
    first: float | None = None
    rows: str = "rows"


CONTENDERS = [
    Contender("standard", OURS, "standard", 2.0),
    Contender("standard", "saelens", "standard", 2.0),
    Contender("standard", "dictionary_learning", "standard", 0.1),
    Contender("standard", "dictionary_learning", "standard-april", 2.0),
    Contender("gated", OURS, "gated", 2.0),
    Contender("gated", "saelens", "gated", 2.0),
    Contender("gated", "dictionary_learning", "gated", 2.0),
    Contender("topk", OURS, "topk"),
    Contender("topk", "saelens", "topk"),
    Contender("topk", "dictionary_learning", "topk"),
    Contender("topk", "sparsify", "topk"),
    Contender("topk", "sparsify", "topk-free-signum"),
    Contender("batchtopk", OURS, "batchtopk"),
    Contender("batchtopk", "saelens", "batchtopk"),
    Contender("batchtopk", "dictionary_learning", "batchtopk"),
    Contender("jumprelu", OURS, "jumprelu"),
    Contender("jumprelu", "saelens", "jumprelu", 1.0),
    Contender("jumprelu", "dictionary_learning", "jumprelu"),
    Contender("matryoshka", OURS, "matryoshka"),
    Contender("matryoshka", "saelens", "matryoshka"),
    Contender("matryoshka", "dictionary_learning", "matryoshka"),
    Contender("transcoder", OURS, "transcoder", rows="pairs"),
    Contender("transcoder", "sparsify", "transcoder", rows="pairs"),
    Contender("transcoder", "sparsify", "transcoder-free-signum", rows="pairs"),
    Contender("skip-transcoder", OURS, "skip-transcoder", rows="pairs"),
    Contender("skip-transcoder", "sparsify", "skip-transcoder", rows="pairs"),
    Contender("skip-transcoder", "sparsify", "skip-transcoder-free-signum", rows="pairs"),
]
