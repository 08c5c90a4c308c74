"""JSON records: one canonical encoding, each carrying its own crc32c.

Canonical bytes are sorted keys, no spaces, ASCII, one final newline. A record is accepted only if
re-encoding what was parsed gives the very bytes that were read, so any changed byte is noticed.
"""

import json
from typing import Any

import google_crc32c

from penstock.common.errors import DamagedObject

Record = dict[str, Any]


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of bytes, as an unsigned 32-bit integer."""
    return int(google_crc32c.value(data))


def encode_record(record: Record) -> bytes:
    """Canonical bytes of a record, with its checksum added under `crc32c`."""
    body = {key: value for key, value in record.items() if key != "crc32c"}
    return _canonical(body | {"crc32c": crc32c(_canonical(body))})


def decode_record(data: bytes, name: str) -> Record:
    """Parse and check a record.

    Args:
        data: the bytes as read.
        name: the object's name, for the error message.

    Raises:
        DamagedObject: not JSON, not canonical, or the checksum does not match.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedObject(f"{name} is damaged: it is not JSON") from error
    if not isinstance(record, dict) or type(record.get("crc32c")) is not int:  # true is an int, too
        raise DamagedObject(f"{name} is damaged: it carries no checksum")
    body = {key: value for key, value in record.items() if key != "crc32c"}
    try:
        intact = record["crc32c"] == crc32c(_canonical(body)) and _canonical(record) == data
    except (ValueError, RecursionError) as error:
        raise DamagedObject(f"{name} is damaged: it cannot be encoded again") from error
    if not intact:
        raise DamagedObject(f"{name} is damaged: its checksum does not match its content")
    return body


def _canonical(record: Record) -> bytes:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"
