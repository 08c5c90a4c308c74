"""What the S3 servers of the tests have in common: one user, buckets, a second way to read an object."""

import urllib.request
import uuid
from urllib.parse import quote
from xml.etree import ElementTree

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

REGION = "us-east-1"


class S3Server:
    """An S3 endpoint at `url`, while it runs. Spoken to over plain HTTP, with no S3 client."""

    url: str
    access_key = "test"
    secret_key = "not-to-be-seen-in-any-message"

    def environment(
        self, url: str | None = None, access_key: str = access_key, secret_key: str = secret_key
    ) -> dict[str, str]:
        """Variables that lead AWS libraries here, or to a proxy at `url` in front of it."""
        return {
            "AWS_ENDPOINT_URL": url or self.url,
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, name: str | None = None) -> str:
        """A new, empty bucket; its name."""
        name = name or f"bucket-{uuid.uuid4().hex[:12]}"
        self._request("PUT", name)
        return name

    def read(self, bucket: str, key: str) -> bytes:
        """An object's bytes; the key as it stands in a URL."""
        return self._request("GET", f"{bucket}/{key}")

    def keys(self, bucket: str) -> list[str]:
        """Every object of a bucket."""
        found: list[str] = []
        while True:
            after = quote(found[-1], safe="") if found else ""
            page = ElementTree.fromstring(
                self._request("GET", f"{bucket}?list-type=2&start-after={after}" if after else bucket)
            )
            names = [element.text or "" for element in page.iterfind("{*}Contents/{*}Key")]
            found += names
            if not names or page.findtext("{*}IsTruncated") != "true":
                return found

    def _request(self, method: str, path: str, data: bytes = b"") -> bytes:
        signed = AWSRequest(method, f"{self.url}/{path}", data=data)
        S3SigV4Auth(Credentials(self.access_key, self.secret_key), "s3", REGION).add_auth(signed)
        request = urllib.request.Request(
            signed.url, data or None, method=method, headers=dict(signed.headers.items())
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return bytes(reply.read())
