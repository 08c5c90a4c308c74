"""Settings of judging dictionaries inside the language model."""

from pydantic import Field

from penstock.common.settings import Settings
from penstock.trainer.judging.tasks.task_settings import AblationSettings, ClozeSettings, FeatureScoreSettings


class ContextSettings(Settings):
    """Features in context: which ones, and how much of the text around them."""

    features: dict[str, list[int]] = {}
    """Features shown, by SAE; of SAEs that are not listed, some are drawn."""
    of_each: int = Field(3, ge=0)
    """Features drawn from each band: the most frequent tenth, the middle fifth and the rarest tenth."""
    seed: int = 0
    """Seed of the draw."""
    examples: int = Field(6, ge=1)
    """Strongest tokens shown of each feature."""
    before: int = Field(12, ge=0)
    """Tokens of text before each of them."""
    after: int = Field(6, ge=0)
    """Tokens of text after each of them."""
    tokens: int = Field(8, ge=0)
    """Tokens shown that a feature's direction promotes, and as many that it suppresses."""
    max_chunks: int = Field(16, ge=1)
    """Chunks of the dataset that are read, evenly spaced over it."""


class JudgingSettings(Settings):
    """What every experiment is given."""

    context: int | None = Field(None, ge=2)
    """Tokens per sequence of the text that dictionaries are judged on; null takes the training context."""
    judged_sequences: int = Field(128, ge=1)
    """Held-out sequences that dictionaries are judged on."""
    contexts: ContextSettings = ContextSettings()
    """Features in context."""
    cloze: ClozeSettings = ClozeSettings()
    """Tasks: prompts whose next word is known."""
    feature_scores: FeatureScoreSettings = FeatureScoreSettings()
    """Scores of features on the tasks."""
    ablation: AblationSettings = AblationSettings()
    """Features taken out on the tasks."""
