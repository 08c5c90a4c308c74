"""What other libraries want to know of a dictionary besides its weights."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """Where a dictionary comes from; None stands for what is not known.

    Attributes:
        sae: its name.
        hook_name: its hook point, by the TransformerLens name.
        run_id: the run that trained it.
        model: the language model's name.
        weights_sha256: digest of the language model's weights.
        revision: of the language model.
        context: tokens per sequence that it was trained on.
        bos: whether sequences begin with the model's BOS token.
        drop_special: whether rows of special tokens were left out.
        corpus: what the text was.
        corpus_digest: digest of the corpus.
    """

    sae: str
    hook_name: str
    run_id: str | None = None
    model: str | None = None
    weights_sha256: str | None = None
    revision: str | None = None
    context: int | None = None
    bos: bool | None = None
    drop_special: bool | None = None
    corpus: str | None = None
    corpus_digest: str | None = None
