"""Secrets are hidden by value and by form, and nothing else is."""

import pytest

from penstock.common import redact as module
from penstock.common.redact import hide, hide_environment, hide_in_url, public_url, redact

SECRET = "s3cr3t/with+odd=ch@rs"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_known", set())


@pytest.mark.parametrize(
    "text",
    [
        "redis://user:PLANTED@host:6379/0",
        "redis://:PLANTED@host",
        "rediss://host/0?password=PLANTED&timeout=3",
        "https://PLANTED@host/path",
        "https://host/path?access_token=PLANTED",
        "https://host/path?X-Amz-Credential=PLANTED&X-Amz-Date=1",
        "https://host/path?sv=1&sig=PLANTED",
        "Authorization: AWS4-HMAC-SHA256 Credential=AK/2026/s3, SignedHeaders=a;b, Signature=PLANTED",
        "{'Authorization': b'AWS4-HMAC-SHA256 Credential=PLANTED', 'X-Amz-Date': b'1'}",
        '{"password": "PLANTED", "user": "me"}',
        "aws_secret_access_key=PLANTED",
        "AWS_SESSION_TOKEN=PLANTED",
        "authorization: Bearer PLANTED",
        "Bearer PLANTED",
        "HF_TOKEN=PLANTED",
        # what a role's credentials come with: nobody knows them beforehand
        r"b'<Credentials>\n<SecretAccessKey>PLANTED</SecretAccessKey>\n<SessionToken>PLANTED</SessionToken>'",
        '{"Code" : "Success", "SecretAccessKey" : "PLANTED", "Token" : "PLANTED"}',
        "Action=AssumeRoleWithWebIdentity&WebIdentityToken=PLANTED&Version=1",
        "{'body': {'WebIdentityToken': 'PLANTED'}}",
        "PUT\nhost:s3\nx-amz-security-token:PLANTED\n\nhost",
        "{'X-Amz-Security-Token': 'PLANTED'}",
        "[(b'X-Amz-Security-Token', b'PLANTED'), (b'Host', b's3')]",
        "[('Authorization', 'Basic PLANTED')]",
        "ReadOnlyCredentials(access_key='AK', secret_key='PLANTED', token=\"PLANTED\", account_id=None)",
        "AccountName=a;AccountKey=PLANTED;EndpointSuffix=core",
    ],
)
def test_what_looks_like_a_secret(text: str) -> None:
    shown = redact(text)
    assert "PLANTED" not in shown
    assert "***" in shown


@pytest.mark.parametrize("secret", ["hf_abcdefghijklmnopqrstuvwxyz", "AKIAIOSFODNN7EXAMPLE"])
def test_keys_that_are_known_by_their_first_letters(secret: str) -> None:
    assert redact(f"using {secret}.") == "using ***."


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/prefix/activations.zarr/acts/blocks.0.hook_out/c/3/0 is missing",
        "http://127.0.0.1:9000/bucket did not serve manifest.json in several tries (HTTP 503)",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        "the corpus has token 291; the model knows only 256",
        "redis.password_file: No such file or directory: /run/secrets/redis",
        "chunk 3 committed  chunk=3 rows=1904 tokens=7",
        "no Redis at unix:///tmp/x/redis.sock (Connection refused)",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("shape", ["{}", "<{}>", "key {}, more"])
def test_what_is_known_to_be_secret_in_every_spelling(shape: str) -> None:
    hide(SECRET)
    spellings = [SECRET, "s3cr3t%2Fwith%2Bodd%3Dch%40rs", "s3cr3t/with%2Bodd%3Dch%40rs"]
    for spelling in spellings:
        assert redact(shape.format(spelling)) == shape.format("***")


def test_a_url_tells_its_secret() -> None:
    hide_in_url("redis://user:pass/word@host:6379/0")
    hide_in_url("https://host/x?token=longer-token&n=1")
    assert redact("AUTH user pass/word") == "AUTH user ***"
    assert redact("got longer-token back") == "got *** back"


def test_the_environment_tells_its_secrets() -> None:
    hide_environment(
        {
            "PENSTOCK_REDIS_PASSWORD": "redis-password",
            "AWS_SECRET_ACCESS_KEY": "secret-key",
            "AWS_ACCESS_KEY_ID": "key-of-somebody",
            "PENSTOCK_REDIS_URL": "redis://:url-password@host",
            "GOOGLE_APPLICATION_CREDENTIALS": "/path/of/a/file",
            "SHORT_TOKEN": "abc",
            "HOME": "/home/somebody",
        }
    )
    shown = redact(
        "redis-password secret-key key-of-somebody url-password /path/of/a/file abc /home/somebody"
    )
    assert shown == "*** *** *** *** /path/of/a/file abc /home/somebody"


def test_a_secret_that_begins_another_one() -> None:
    hide("secret")
    hide("secret-and-more")
    assert redact("secret-and-more") == "***"


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("redis://:password@host:6379/0", "redis://host:6379/0"),
        ("redis://user:pass/w@rd@host:6379/0", "redis://host:6379/0"),
        ("redis://host?password=x", "redis://host"),
        ("unix:///tmp/redis.sock", "unix:///tmp/redis.sock"),
    ],
)
def test_a_url_for_files_that_stay(url: str, public: str) -> None:
    assert public_url(url) == public
