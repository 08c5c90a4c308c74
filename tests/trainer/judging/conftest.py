"""What is judged in these tests."""

import pytest

from penstock.common.model.language_model import LanguageModel
from penstock.trainer.judging.splicing.text import Text
from services.judged import random_text
from services.lm import shipped_model


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return shipped_model()


@pytest.fixture(scope="session")
def text() -> Text:
    return random_text()
