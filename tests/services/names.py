"""A name server as Docker has one inside its networks: a service's name stands for all its containers."""

import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType

_A = 1


class NameServer:
    """Answers questions for addresses (A records) by UDP, for as long as the `with` block lasts.

    Args:
        find: name -> addresses.
    """

    def __init__(self, address: str, find: Callable[[str], list[str]]) -> None:
        self._find = find
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((address, 53))
        self._socket.settimeout(0.2)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="names", daemon=True)

    def __enter__(self) -> "NameServer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                question, client = self._socket.recvfrom(4096)
            except TimeoutError:
                continue
            self._socket.sendto(self._answer(question), client)

    def _answer(self, question: bytes) -> bytes:
        (number,) = struct.unpack_from("!H", question)
        labels, at = [], 12
        while length := question[at]:
            labels.append(question[at + 1 : at + 1 + length].decode())
            at += 1 + length
        (kind,) = struct.unpack_from("!H", question, at + 1)
        addresses = self._find(".".join(labels))
        found = addresses if kind == _A else []
        # what nobody has is unknown (3); of what is known there may be no record of a kind
        flags = 0x8580 if addresses else 0x8583
        reply = struct.pack("!6H", number, flags, 1, len(found), 0, 0) + question[12 : at + 5]
        for address in found:
            # the question's name; valid for no time at all
            reply += struct.pack("!3HIH", 0xC00C, _A, 1, 0, 4) + socket.inet_aton(address)
        return reply
