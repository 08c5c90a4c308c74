"""The ground truth of a toy dataset: pinned by the manifest, kept twice, checked on opening."""

from pathlib import Path

import numpy as np
import pytest

from penstock.common.errors import DamagedObject, ObjectMissing
from penstock.deploy.heal import faults
from penstock.producer.own import produce_from
from penstock.producer.plan import DatasetSettings
from penstock.producer.toy import Toy, ToySettings
from penstock.producer.toy_source import ToySource, plan_toy
from penstock.store.dataset import Dataset
from penstock.store.objects import open_store
from penstock.store.truth import Truth, load_truth, store_truth
from services.synthetic import write_dataset

TOY = Toy(ToySettings(d_in=8, features=12, active=2.0, rows_per_sequence=16))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    store = open_store(str(tmp_path / "dataset"))
    manifest = plan_toy(DatasetSettings(hooks=["toy"], max_rows=64, sequences_per_chunk=2), TOY)
    store_truth(store, manifest, TOY.truth)
    return produce_from(store.url, manifest, ToySource(manifest, TOY))


def test_it_is_loaded_as_it_was_stored(dataset: Dataset) -> None:
    truth = load_truth(dataset)
    assert truth is not None
    for name in ("features", "probabilities", "scales"):
        there, here = getattr(truth, name), getattr(TOY.truth, name)
        assert there.dtype == here.dtype
        assert np.array_equal(there, here)
    assert truth.settings == TOY.settings.record()
    assert truth.digest == dataset.manifest.source.weights_sha256 == dataset.manifest.corpus.digest


def test_it_can_be_read_without_us(dataset: Dataset) -> None:
    from safetensors.numpy import load_file

    there = load_file(f"{dataset.url}/truth.safetensors")
    assert np.array_equal(there["features"], TOY.truth.features)


def test_other_datasets_have_none(tmp_path: Path) -> None:
    assert load_truth(write_dataset(tmp_path)) is None


def test_it_is_stored_once(dataset: Dataset) -> None:
    store_truth(dataset.store, dataset.manifest, TOY.truth)
    other = Toy(TOY.settings.model_copy(update={"seed": 1})).truth
    with pytest.raises(ValueError, match="not the manifest's"):
        store_truth(dataset.store, dataset.manifest, other)


def test_one_copy_that_a_dead_producer_left_is_completed(dataset: Dataset) -> None:
    dataset.store.delete("truth.safetensors")
    with pytest.raises(ObjectMissing):
        load_truth(dataset)
    store_truth(dataset.store, dataset.manifest, TOY.truth)
    assert load_truth(dataset) is not None


def test_another_truth_is_refused(dataset: Dataset) -> None:
    moved = TOY.truth.features.copy()
    moved[3] = moved[4]
    truth = Truth(moved, TOY.truth.probabilities, TOY.truth.scales, TOY.truth.settings)
    dataset.store.put("truth.safetensors", truth.encode())
    with pytest.raises(DamagedObject, match=r"truth\.safetensors is damaged: it is not the ground truth"):
        load_truth(dataset)
    with pytest.raises(DamagedObject):
        store_truth(dataset.store, dataset.manifest, TOY.truth)


@pytest.mark.parametrize("lost", ["truth.safetensors", "truth.copy"])
@pytest.mark.parametrize("how", ["missing", "one bit", "cut"])
def test_verify_finds_and_restores_it(dataset: Dataset, lost: str, how: str) -> None:
    assert list(faults(dataset.url)[1]) == []
    whole = dataset.store.get(lost)
    if how == "missing":
        dataset.store.delete(lost)
    else:
        cut = whole[:100] if how == "cut" else whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
        dataset.store.put(lost, cut)
    (fault,) = faults(dataset.url)[1]
    assert lost in fault.problem
    assert fault.remedy == "restores it from its copy"
    assert fault.restore is not None
    fault.restore()
    assert dataset.store.get(lost) == whole


def test_verify_says_when_both_are_gone(dataset: Dataset) -> None:
    for key in ("truth.safetensors", "truth.copy"):
        dataset.store.delete(key)
    found = list(faults(dataset.url)[1])
    assert [fault.remedy for fault in found] == ["cannot help: its copy is gone, too"] * 2
