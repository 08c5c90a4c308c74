"""The shipped language model, loaded once per test process, and a little text for it."""

from functools import cache
from pathlib import Path

from penstock.common.model.files import LoadedTokenizer, ModelSettings, find_model, load_tokenizer
from penstock.common.model.language_model import LanguageModel

RESID_3, MLP_2 = "blocks.3.hook_resid_post", "blocks.2.mlp.hook_post"


@cache
def shipped_model() -> LanguageModel:
    """builtin:pystd-6l; loading takes seconds."""
    settings = ModelSettings()
    return LanguageModel(find_model(settings), settings)


@cache
def shipped_tokenizer() -> LoadedTokenizer:
    return load_tokenizer(find_model(ModelSettings()))


def write_text(directory: Path, documents: int = 40) -> str:
    """Files of Python-like text of different lengths; returns the glob pattern that finds them."""
    for number in range(documents):
        folder = directory / f"package{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            f"def function_{number}_{line}(value):\n    return value * {line * number} + {line}\n"
            for line in range(3 + 5 * number % 17)
        ]
        (folder / f"module{number}.py").write_text(f'"""Module {number}."""\n\n' + "\n".join(lines))
    return str(directory / "**" / "*.py")
