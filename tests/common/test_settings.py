"""Configuration files: every mistake gives one line that names the field and the fix."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.common.errors import ConfigError
from penstock.deploy.config import Config, load_config
from penstock.trainer.kinds import StandardSettings, TopKSettings

TOPK: dict[str, Any] = {
    "name": "topk",
    "architecture": "topk",
    "hook_name": "blocks.3.hook_resid_post",
    "d_sae": 64,
    "k": 4,
}
STANDARD: dict[str, Any] = {
    "name": "l1",
    "architecture": "standard",
    "hook_name": "blocks.3.hook_resid_post",
    "d_sae": 64,
    "l1_coefficient": 0.5,
}
GOOD: dict[str, Any] = {
    "dataset": {"hooks": ["blocks.3.hook_resid_post"]},
    "runs": [{"name": "first", "saes": [TOPK, STANDARD]}],
    "redis": {"lease_seconds": 20},
}


def load(directory: Path, data: Any) -> Config:
    path = directory / "config.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return load_config(str(path))


def refusal(directory: Path, data: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(directory, data)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(directory / "config.yaml"))
    return message


def spoilt(*path: str | int, value: Any = None, remove: bool = False) -> dict[str, Any]:
    """The good configuration with one setting changed or removed."""
    data = copy.deepcopy(GOOD)
    at: Any = data
    for part in path[:-1]:
        at = at[part]
    if remove:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return data


def test_a_good_file_is_read(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    first, second = config.runs[0].saes
    assert isinstance(first, TopKSettings)
    assert isinstance(second, StandardSettings)
    assert (first.k, second.l1_coefficient) == (4, 0.5)
    assert config.redis.lease_seconds == 20.0


def test_relative_places_are_below_the_workdir(tmp_path: Path) -> None:
    data = GOOD | {"workdir": str(tmp_path / "work"), "runs_url": "s3://bucket/runs"}
    config = load(tmp_path, data)
    assert config.dataset.url == str(tmp_path / "work" / "dataset")
    assert config.corpus.url == str(tmp_path / "work" / "corpus")
    assert config.runs_url == "s3://bucket/runs"
    path = str(tmp_path / "config.yaml")
    assert load_config(path, workdir="/elsewhere").dataset.url == "/elsewhere/dataset"


def test_datasets_of_runs_and_earlier_ones_are_below_the_workdir_too(tmp_path: Path) -> None:
    data = copy.deepcopy(GOOD) | {"workdir": str(tmp_path / "work")}
    data["dataset"]["after"] = "first"
    data["runs"][0]["datasets"] = ["first", "s3://bucket/second", "dataset"]
    config = load(tmp_path, data)
    work = str(tmp_path / "work")
    assert config.dataset.after == [f"{work}/first"], "one may stand for a list of one"
    assert config.runs[0].datasets == [f"{work}/first", "s3://bucket/second", f"{work}/dataset"]
    assert config.dataset_urls() == [f"{work}/dataset", f"{work}/first", "s3://bucket/second"]
    data["runs"][0]["datasets"] = []
    assert load(tmp_path, data).dataset_urls() == [f"{work}/dataset"]
    data["dataset"]["after"] = ["first", "dataset"]
    with pytest.raises(ConfigError, match=r"dataset\.after: .*/dataset is the dataset itself"):
        load(tmp_path, data)


def test_settings_do_not_change(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    with pytest.raises(ValueError, match="frozen"):
        config.producers = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("path", "field", "suggestion"),
    [
        (("datset",), "datset", "dataset"),
        (("dataset", "hook"), "dataset.hook", "hooks"),
        (("redis", "lease_second"), "redis.lease_second", "lease_seconds"),
        (("runs", 0, "batch_row"), "runs.0.batch_row", "batch_rows"),
        (("runs", 0, "saes", 0, "dsae"), "runs.0.saes.0.topk.dsae", "d_sae"),
        (("runs", 0, "saes", 1, "l1_coeficient"), "runs.0.saes.1.standard.l1_coeficient", "l1_coefficient"),
    ],
)
def test_an_unknown_setting_suggests_the_nearest(
    tmp_path: Path, path: tuple[str | int, ...], field: str, suggestion: str
) -> None:
    message = refusal(tmp_path, spoilt(*path, value=1))
    assert f" {field}: unknown setting. Did you mean {suggestion}" in message


def test_settings_of_the_other_architecture_are_not_suggested(tmp_path: Path) -> None:
    message = refusal(tmp_path, spoilt("runs", 0, "saes", 0, "l1_coeficient", value=1))
    assert "l1_coefficient" not in message


def test_an_unknown_setting_far_from_any_lists_what_there_is(tmp_path: Path) -> None:
    message = refusal(tmp_path, spoilt("redis", "zzz", value=1))
    assert "Known: lease_seconds, password_file, prefix, url." in message


def test_a_misspelt_setting_explains_the_missing_one(tmp_path: Path) -> None:
    data = spoilt("dataset", remove=True) | {"datasets": {"hooks": ["x"]}}
    message = refusal(tmp_path, data)
    assert "datasets: unknown setting. Did you mean dataset" in message
    assert "(and 1 more)" in message


@pytest.mark.parametrize(
    ("path", "field"),
    [
        (("dataset",), "dataset"),
        (("dataset", "hooks"), "dataset.hooks"),
        (("runs", 0, "name"), "runs.0.name"),
        (("runs", 0, "saes", 0, "k"), "runs.0.saes.0.topk.k"),
    ],
)
def test_a_missing_setting_is_named(tmp_path: Path, path: tuple[str | int, ...], field: str) -> None:
    assert f" {field}: missing" in refusal(tmp_path, spoilt(*path, remove=True))


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        (("producers",), "two", ["producers: ", "integer", "not 'two'"]),
        (("producers",), 1.5, ["producers: ", "integer", "not 1.5"]),
        (("producers",), -1, ["producers: ", "greater than or equal to 0", "not -1"]),
        (("json_logs",), "yes", ["json_logs: ", "boolean", "not 'yes'"]),
        (("dataset", "hooks"), "blocks.3", ["dataset.hooks: ", "list", "not 'blocks.3'"]),
        (("dataset", "hooks"), [], ["dataset.hooks: ", "at least 1"]),
        (("dataset", "hooks"), ["a", 2], ["dataset.hooks.1: ", "string", "not 2"]),
        (("dataset",), ["a"], ["dataset: ", "not ['a']"]),
        (("runs", 0, "saes", 1, "d_sae"), 0, ["runs.0.saes.1.standard.d_sae: ", "not 0"]),
        (("runs", 0, "name"), "a b", ["runs.0.name: ", "not 'a b'"]),
        (("corpus",), {"text": "files"}, ["corpus: files must list patterns"]),
    ],
)
def test_a_wrong_value_is_named(
    tmp_path: Path, path: tuple[str | int, ...], value: Any, parts: list[str]
) -> None:
    message = refusal(tmp_path, spoilt(*path, value=value))
    for part in parts:
        assert part in message


def test_an_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    message = refusal(tmp_path, spoilt("runs", 0, "saes", 0, "architecture", value="topkk"))
    assert "runs.0.saes.0: " in message
    for name in ("'topkk'", "'topk'", "'standard'"):
        assert name in message


def test_a_missing_architecture_is_asked_for(tmp_path: Path) -> None:
    message = refusal(tmp_path, spoilt("runs", 0, "saes", 1, "architecture", remove=True))
    assert "runs.0.saes.1: " in message
    assert "architecture" in message


def test_names_are_used_once(tmp_path: Path) -> None:
    twice = GOOD["runs"] + GOOD["runs"]
    assert "runs: two runs have the same name" in refusal(tmp_path, GOOD | {"runs": twice})
    saes = [TOPK, STANDARD | {"name": "topk"}]
    assert "'topk' is used twice" in refusal(tmp_path, spoilt("runs", 0, "saes", value=saes))


def test_a_long_value_is_shortened(tmp_path: Path) -> None:
    assert len(refusal(tmp_path, spoilt("producers", value="x" * 10_000))) < len(str(tmp_path)) + 250


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", "+1e-03"])
def test_numbers_may_be_written_with_an_exponent(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(spoilt("runs", 0, "saes", 0, "lr", value="HERE")).replace("HERE", text)
    )
    assert load_config(str(tmp_path / "config.yaml")).runs[0].saes[0].lr == 0.001


def test_a_quoted_number_is_text(tmp_path: Path) -> None:
    assert "lr: " in refusal(tmp_path, spoilt("runs", 0, "saes", 0, "lr", value="0.001"))


def test_a_syntax_error_names_its_line(tmp_path: Path) -> None:
    assert "not valid YAML (line 3)" in refusal(tmp_path, "dataset:\n  hooks: [a\nruns: []\n")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text", "42"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "must hold a mapping" in refusal(tmp_path, text)


def test_a_key_that_is_no_text_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path, "dataset: {hooks: [a]}\n1: 2\n")


def test_python_objects_are_not_made(tmp_path: Path) -> None:
    text = f"workdir: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']"
    assert "not valid YAML" in refusal(tmp_path, text)
    assert not (tmp_path / "made").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_config(str(tmp_path / "none.yaml"))


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(tmp_path))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"workdir: \xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(tmp_path / "config.yaml"))


def test_json_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dataset": {"hooks": ["a"]}}')
    assert load_config(str(tmp_path / "config.json")).dataset.hooks == ["a"]


def test_every_setting_is_described() -> None:
    schema = Config.model_json_schema()
    models = [schema, *schema["$defs"].values()]
    bare = [
        f"{model['title']}.{name}"
        for model in models
        for name, field in model.get("properties", {}).items()
        if not field.get("description")
    ]
    assert bare == []
