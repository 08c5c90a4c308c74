"""Settings of cloze tasks, of features judged by them, and of features taken out one by one."""

from pydantic import Field

from penstock.common.settings import Settings


class ClozeSettings(Settings):
    """Prompts whose next word is known."""

    sources: list[str] = Field(default=["builtin"], min_length=1)
    """Where prompts come from: `builtin` (made of held-out Python text), `lambada:FILE`, `cbt:FILE`."""
    per_task: int = Field(60, ge=1)
    """Prompts of each task; of a file with more of them, that many are drawn."""
    max_tokens: int | None = Field(None, ge=8)
    """Tokens of a prompt, at most, BOS included: longer ones lose their beginning. null: the model's context,
    and 128 for `builtin`, which then makes no longer ones."""
    seed: int = 0
    """Seed of the draw."""


class FeatureScoreSettings(Settings):
    """Features judged by the prompts that they are active on."""

    last_tokens: int = Field(32, ge=1)
    """A feature counts as active on a prompt if it is on one of this many last tokens."""
    listed: int = Field(10, ge=1)
    """Features listed at each end of the table."""


class AblationSettings(Settings):
    """Features taken out one by one."""

    candidates: int | None = Field(16, ge=1)
    """Features of each dictionary that are taken out; null: every one that is active on a prompt."""
    prompts: int = Field(64, ge=1)
    """Prompts that this is done on, at most, evenly drawn from the tasks."""
    last_tokens: int = Field(32, ge=1)
    """Candidates are active on one of this many last tokens of a prompt."""
    listed: int = Field(8, ge=1)
    """Features listed as helpful and as harmful, at most."""
    contexts: int = Field(3, ge=1)
    """Strongest contexts shown of each."""
    before: int = Field(12, ge=0)
    """Tokens of text before the active one."""
    after: int = Field(6, ge=0)
    """Tokens of text after it."""
