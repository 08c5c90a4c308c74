"""A model of GPT-2 small's size is judged in little memory, however many sequences or prompts there are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.common.model.files import ModelSettings, find_model

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

SEQUENCES_OF_1024 = 2
MOST = 6e9
GROWTH = 150e6

COMMON = """
import json, resource, sys
import numpy as np
import torch
from penstock.common.model.files import ModelSettings, find_model
from penstock.common.model.language_model import LanguageModel
from penstock.trainer.judging.tasks import ablation, cloze_score, feature_scores
from penstock.trainer.judging.sequences import positions, propagation
from penstock.trainer.judging.tasks.cloze import Cloze, Item
from penstock.trainer.judging.splicing.dictionaries import Dictionary
from penstock.trainer.judging.splicing.subject import Subject
from penstock.trainer.judging.tasks.task_settings import AblationSettings, FeatureScoreSettings
from penstock.trainer.judging.splicing.text import Text
from penstock.trainer.kinds import TopKSettings
from penstock.trainer.sae import build

directory, context, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
settings = ModelSettings(name=directory, threads=2)
model = LanguageModel(find_model(settings), settings)
assert (model.vocabulary, model.context) == (50257, 1024)
dictionaries = []
for layer in (4, 8):
    own = TopKSettings(architecture="topk", name="sae", hook_name=f"blocks.{layer}.hook_resid_post",
                       d_sae=6144, k=32)
    sae = build(768, own)
    sae.initialise(layer, None)
    dictionaries.append(Dictionary.of_sae(f"sae{layer}", sae.eval(), model.device))
tokens = np.random.default_rng(0).integers(1, 50257, (count, context)).astype(np.int32)
tokens[:, 0] = 0
subject = Subject(model, Text(tokens, [0]), dictionaries[:1], context // 2)
"""
SEQUENCES = """
found = positions.measure(subject)
behind = propagation.measure(Subject(model, Text(tokens[:2], [0]), dictionaries, context // 2))
values = [found["dictionaries"][0]["metrics"][name]["overall"]["mean"] for name in ("kl", "delta_ce", "l0")]
values += [cell["relative"]["stream_error"]["mean"] for cell in behind["cells"]]
"""
PROMPTS = """
cloze = Cloze([Item("task", "", "", tuple(row[:-1].tolist()), int(row[-1])) for row in tokens])
answers = cloze_score.measure(subject, cloze)
scores = feature_scores.measure(subject, cloze, FeatureScoreSettings())
out = ablation.measure(subject, cloze, AblationSettings(candidates=2, prompts=count), lambda tokens: "")
values = [answers["dictionaries"][0]["mean_delta_ln_p"], scores["dictionaries"][0]["l0"]]
values += [effect["mean_effect"] for effect in out["dictionaries"][0]["effects"]]
"""
TOLD = """
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "values": values}))
"""


@pytest.fixture(scope="module")
def gpt2_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of that size, with the shipped model's tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    directory = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(GPT2Config()).save_pretrained(directory)
    shipped = find_model(ModelSettings()).directory
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((shipped / name).read_bytes())
    return directory


def judged(directory: Path, what: str, context: int, count: int) -> float:
    """Peak resident memory in bytes."""
    child = COMMON + what + TOLD
    command = [sys.executable, "-c", child, str(directory), str(context), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(f"{count} of {context}: {told}")
    assert all(value is not None for value in told["values"])
    return float(told["peak"])


def test_a_model_of_gpt2_smalls_size_is_judged_below_6_gb(gpt2_small: Path) -> None:
    assert judged(gpt2_small, SEQUENCES, 1024, SEQUENCES_OF_1024) < MOST


def test_memory_does_not_grow_with_the_sequences(gpt2_small: Path) -> None:
    """Two sequences of this length make a batch: two batches against eight."""
    few, many = (judged(gpt2_small, SEQUENCES, 128, sequences) for sequences in (4, 16))
    assert many - few < GROWTH


def test_memory_does_not_grow_with_the_prompts(gpt2_small: Path) -> None:
    """Ten prompts of this length make a batch: two batches against six."""
    few, many = (judged(gpt2_small, PROMPTS, 33, prompts) for prompts in (20, 60))
    assert many < MOST
    assert many - few < GROWTH
