"""What errors of S3 and of the libraries below `S3Store` mean: which may pass, what to do about the rest."""

import os
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from penstock.common.errors import ObjectMissing, PenstockError, StoreError, Unavailable

_TRANSIENT_STATUS = {408, 409, 429, 500, 502, 503, 504}
_TRANSIENT_CODES = {
    "BadDigest",  # what arrived is not what was sent
    "InternalError",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
}
_TRANSIENT_ERRORS = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    ResponseParserError,  # a load balancer's page in place of S3's XML
    aiohttp.ClientError,
    TimeoutError,
    ConnectionError,
)
_CREDENTIAL_CODES = {
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidSecurity",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}


ENDPOINT = "<endpoint>"


@dataclass(frozen=True)
class Where:
    """What a failed request was about. `endpoint` names the server; ask once a request was sent."""

    url: str
    bucket: str
    key: str
    endpoint: Callable[[], str]


def explain(error: Exception, where: Where) -> PenstockError | None:
    """One clear error in place of the library's; None for what is no matter of the store."""
    name, answer, word = f"{where.url}/{where.key}", status(error), code(error)
    trust = trust_problem(error)
    if trust is not None:
        return StoreError(f"{where.url}: {trust.replace(ENDPOINT, where.endpoint())}")
    if is_transient(error):
        return Unavailable(
            f"{where.url}: {where.endpoint()} did not serve {where.key or 'a listing'} in several "
            f"tries ({brief(error)}); check that it is up, and AWS_ENDPOINT_URL"
        )
    if isinstance(
        error,
        (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError),
    ):
        return StoreError(
            f"{where.url}: no usable credentials ({type(error).__name__}); "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if word == "NoSuchBucket":
        return StoreError(
            f"{where.url}: {where.endpoint()} has no bucket {where.bucket}; create it or correct the URL"
        )
    if answer == 404:
        return ObjectMissing(f"{name} is missing")
    if word in _CREDENTIAL_CODES:
        return StoreError(
            f"{where.url}: {where.endpoint()} refused the credentials ({word}); "
            "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and the clock"
        )
    if answer in (401, 403):
        return StoreError(
            f"{name}: access denied ({brief(error)}); the credentials need s3:GetObject, "
            "s3:PutObject, s3:DeleteObject and s3:ListBucket"
        )
    if answer == 501:
        return StoreError(
            f"{name}: {where.endpoint()} does not honour exclusive create (If-None-Match) "
            f"or another request ({brief(error)}); use another server"
        )
    if answer is not None:
        return StoreError(
            f"{name}: {where.endpoint()} refused the request ({brief(error)}); "
            "check the URL, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL"
        )
    if isinstance(error, (boto.BotoCoreError, ValueError, OSError)):
        return StoreError(
            f"{where.url}: cannot be used as it is set up ({brief(error)}); "
            "check AWS_ENDPOINT_URL, AWS_PROFILE and the AWS configuration files"
        )
    return None


def _response(error: BaseException) -> dict[str, Any]:
    """S3's reply as botocore parsed it; s3fs hangs the botocore error below its own."""
    for candidate in (error, error.__cause__):
        if isinstance(response := getattr(candidate, "response", None), dict):
            return response
    return {}


def status(error: BaseException) -> int | None:
    answer = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(answer) if answer is not None else None


def code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def trust_problem(error: BaseException) -> str | None:
    """Why a TLS server is not trusted, with ENDPOINT for its name; None if that is not the trouble."""
    seen: list[Any] = [error]
    for below in seen:  # grows: libraries hang the first error in different places
        if isinstance(below, ssl.SSLCertVerificationError) and not isinstance(below, aiohttp.ClientError):
            why = below.verify_message
            return (
                f"the certificate of {ENDPOINT} is not trusted ({why}); set AWS_CA_BUNDLE to a file with "
                "the certificate of the authority that signed it"
            )
        unreadable = (FileNotFoundError, PermissionError, IsADirectoryError)
        if below is not error and (
            isinstance(below, unreadable) or getattr(below, "library", None) in ("X509", "PEM")
        ):
            return (
                f"the certificates to trust cannot be read ({type(below).__name__}); correct AWS_CA_BUNDLE "
                f"({os.environ.get('AWS_CA_BUNDLE', 'not set')}) or the profile's ca_bundle"
            )
        if isinstance(below, boto.BotoCoreError):
            inner = (below.__cause__, below.kwargs.get("error"))
            seen += [found for found in inner if isinstance(found, BaseException) and found not in seen]
        elif isinstance(below, aiohttp.ClientError):
            inner = (getattr(below, "certificate_error", None), getattr(below, "os_error", None))
            seen += [found for found in inner if isinstance(found, ssl.SSLError)]
    return None


def is_transient(error: BaseException) -> bool:
    if trust_problem(error) is not None:
        return False
    if (answer := status(error)) is not None:
        return answer in _TRANSIENT_STATUS or code(error) in _TRANSIENT_CODES
    return isinstance(error, _TRANSIENT_ERRORS)


def brief(error: BaseException) -> str:
    """A few words for a log line or a message: never a header, a body or a signature."""
    if (answer := status(error)) is not None:
        word = code(error)
        return f"HTTP {answer}" if word in ("", str(answer)) else f"HTTP {answer} {word}"
    if isinstance(error, _TRANSIENT_ERRORS):
        return type(error).__name__
    return without_secrets(" ".join(str(error).split()) or type(error).__name__)


def without_secrets(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)
