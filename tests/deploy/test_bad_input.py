"""Bad input gives one clear line, exit code 2, no traceback, and nothing is lost."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from penstock.common.model.files import ModelSettings, find_model
from services.command import assert_one_clear_line, penstock, small_config, write_config
from services.moto import MotoServer
from services.proxy import FaultProxy
from services.valkey import connected, valkey_server


def config_file(tmp_path: Path, **changes: Any) -> Path:
    return write_config(tmp_path / "config.yaml", small_config(tmp_path / "work", **changes))


def test_an_unknown_setting_names_the_nearest(tmp_path: Path) -> None:
    result = penstock("run", config_file(tmp_path, dataset__hoks=["x"]))
    assert_one_clear_line(result, "dataset.hoks", "unknown setting", "Did you mean hooks?")


def test_an_unknown_setting_of_an_sae_names_the_nearest(tmp_path: Path) -> None:
    config = small_config(tmp_path / "work")
    config["runs"][0]["saes"] = [config["runs"][0]["saes"][0] | {"d_saes": 3}]
    result = penstock("run", write_config(tmp_path / "c.yaml", config))
    assert_one_clear_line(result, "d_saes", "Did you mean d_sae?")


def test_a_wrong_type_names_the_field(tmp_path: Path) -> None:
    result = penstock("run", config_file(tmp_path, producers="two"))
    assert_one_clear_line(result, "producers", "integer", "'two'")


def test_a_missing_config_file(tmp_path: Path) -> None:
    assert_one_clear_line(penstock("run", tmp_path / "nowhere.yaml"), "nowhere.yaml", "no such file")


def test_a_missing_text_file(tmp_path: Path) -> None:
    file = config_file(tmp_path, corpus__text="files", corpus__files=[str(tmp_path / "nothing" / "*.txt")])
    assert_one_clear_line(penstock("corpus", file), "corpus.files", "nothing/*.txt")


@pytest.mark.parametrize("name", ["./no-such-directory", "no-such-owner/no-such-model"])
def test_a_model_that_is_neither_a_directory_nor_reachable(tmp_path: Path, name: str) -> None:
    result = penstock("corpus", config_file(tmp_path, model={"name": name}))
    assert_one_clear_line(result, "model.name", name)


def test_a_hook_that_the_model_lacks_lists_near_names(tmp_path: Path) -> None:
    file = config_file(tmp_path, dataset__hooks=["blocks.1.hook_resid_pots"], runs=[], trainers=0)
    result = penstock("run", file)
    assert_one_clear_line(result, "blocks.1.hook_resid_pots", "Did you mean", "blocks.1.hook_resid_post")


def test_a_dataset_url_that_holds_another_plan(tmp_path: Path, small_run: Path) -> None:
    shutil.copytree(small_run / "dataset", tmp_path / "work" / "dataset")
    before = (tmp_path / "work" / "dataset" / "manifest.json").read_bytes()
    result = penstock("run", config_file(tmp_path, dataset__seed=7, runs=[], trainers=0))
    assert_one_clear_line(result, "another dataset", "seed is 0 there and 7 here")
    assert (tmp_path / "work" / "dataset" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("command", ["produce", "train"])
def test_an_unreachable_redis(tmp_path: Path, command: str) -> None:
    file = config_file(tmp_path, redis={"url": "redis://:secret@127.0.0.1:1/0"})
    result = penstock(command, file)
    assert_one_clear_line(result, "redis.url", "127.0.0.1:1")
    assert "secret" not in result.stderr


def test_an_object_store_that_ignores_conditional_create(tmp_path: Path, valkey_url: str) -> None:
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    with MotoServer() as moto, FaultProxy(moto.url) as proxy:
        proxy.strip_if_none_match = True
        url = f"s3://{moto.make_bucket()}/runs"
        result = penstock(
            "train",
            config_file(tmp_path, runs_url=url, redis={"url": valkey_url}),
            env=credentials | {"AWS_ENDPOINT_URL": proxy.url, "AWS_DEFAULT_REGION": "us-east-1"},
        )
    assert_one_clear_line(result, url, "does not honour exclusive create")


def test_model_weights_that_differ_from_the_manifest(tmp_path: Path, small_run: Path) -> None:
    import safetensors.torch

    model = tmp_path / "builtin:pystd-6l"  # the same name, so that only the weights differ
    shutil.copytree(find_model(ModelSettings()).directory, model)
    weights = safetensors.torch.load_file(model / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.bias"][0] += 1
    safetensors.torch.save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(small_run / "dataset", tmp_path / "work" / "dataset")
    shutil.copytree(small_run / "corpus", tmp_path / "work" / "corpus")
    result = penstock("run", config_file(tmp_path, model={"name": str(model)}, runs=[], trainers=0))
    assert_one_clear_line(result, "another dataset", "source.weights_sha256")


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = penstock("train", config_file(tmp_path, metrics={"port": port}))
    assert_one_clear_line(result, "metrics.port", str(port))


@pytest.mark.parametrize("command", ["produce", "train"])
def test_a_redis_that_may_evict(tmp_path: Path, command: str) -> None:
    with valkey_server() as server:
        client = connected(server)
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.close()
        result = penstock(command, config_file(tmp_path, redis={"url": server.url}))
    assert_one_clear_line(result, "redis.url", server.url, "allkeys-lru", "maxmemory-policy noeviction")
