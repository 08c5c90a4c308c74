"""`penstock bucket`: the one thing that must be there before anything can be stored on S3."""

from penstock.common.errors import UserError
from penstock.store.objects import open_store
from penstock.store.s3 import S3Store


def make_bucket(url: str) -> tuple[str, bool]:
    """Create the bucket of an S3 URL unless it is there.

    Returns:
        The bucket's URL, and whether it is new.

    Raises:
        UserError: not an S3 URL; the server does not allow it.
    """
    store = open_store(url)
    if not isinstance(store, S3Store):
        raise UserError(f"{url} has no bucket; give an S3 URL: s3://bucket")
    return store.make_bucket()
