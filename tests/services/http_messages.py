"""Just enough HTTP/1.1 to know where a request or a reply ends."""

import asyncio
from dataclasses import dataclass

_FRAMING = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


@dataclass(frozen=True)
class Head:
    """The first line and the header fields, as they were sent."""

    first: str
    fields: tuple[tuple[str, str], ...]

    def get(self, name: str) -> str:
        """A field's value; empty without one."""
        return next((value for known, value in self.fields if known.lower() == name), "")

    @property
    def status(self) -> int:
        """Of a reply."""
        return int(self.first.split()[1])

    def without(self, *names: str) -> "Head":
        """Less the fields whose names start with one of these."""
        return Head(self.first, tuple(f for f in self.fields if not f[0].lower().startswith(names)))

    def framed(self, length: int | str) -> "Head":
        """For a kept connection, with a body of known length."""
        fields = tuple(field for field in self.fields if field[0].lower() not in _FRAMING)
        return Head(self.first, (*fields, ("Content-Length", str(length))))

    def encode(self) -> bytes:
        lines = [self.first, *(f"{name}: {value}" for name, value in self.fields)]
        return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """The next message's head; None if the connection ended before it.

    Raises:
        IncompleteReadError: it ended inside.
    """
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return Head(first, tuple((name, value.strip()) for name, _, value in pairs))


async def read_body(reader: asyncio.StreamReader, head: Head, *, to_the_end: bool = False) -> bytes:
    """A message's body, out of its chunks if it came in chunks.

    Args:
        reader: the connection, after the head.
        head: the message's.
        to_the_end: a body of unsaid length ends with the connection, as a reply's does.

    Raises:
        IncompleteReadError: the connection ended inside.
    """
    if head.get("transfer-encoding").lower() == "chunked":
        return await _read_chunks(reader)
    if length := head.get("content-length"):
        return await reader.readexactly(int(length))
    return await reader.read() if to_the_end else b""


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    whole = bytearray()
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        whole += (await reader.readexactly(size + 2))[:-2]
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass  # a trailer
    return bytes(whole)
