"""What is judged: dictionaries, the model they belong to, and the text they are judged on."""

from dataclasses import dataclass

from penstock.common.model.language_model import LanguageModel
from penstock.trainer.judging.splicing.dictionaries import Dictionary
from penstock.trainer.judging.splicing.text import Text


@dataclass(frozen=True)
class Subject:
    """Everything that an experiment needs.

    Attributes:
        trained_context: C of the sequences that the dictionaries were trained on.
    """

    model: LanguageModel
    text: Text
    dictionaries: list[Dictionary]
    trained_context: int

    def hook_names(self) -> list[str]:
        """Hook points that are read or replaced, each once, in order."""
        pairs = [(d.hook_name, d.hook_out) for d in self.dictionaries]
        return list(dict.fromkeys(name for pair in pairs for name in pair))
