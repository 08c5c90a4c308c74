"""A proxy that fails on request: lost and cut replies, refusals, a dropped header."""

from collections.abc import Iterator

from services.http_messages import Head
from services.tcp_proxy import Answer, Fault, Policy, Request, TcpProxy


class FaultProxy(TcpProxy, Policy):
    """Stands in front of the server at `upstream`. Set the fault attributes between calls."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream, self)
        self.requests: list[tuple[str, str]] = []
        """(method, path) of every request that arrived."""
        self.heads: list[Head] = []
        """Of every request that was forwarded, as it arrived."""
        self.answers: Iterator[tuple[int, str]] = iter(())
        """(status, S3 error code) given in place of forwarding, one per request until used up."""
        self.strip_if_none_match = False
        self.strip_metadata = False
        self.lost_put_replies = 0
        """Close the connection after this many forwarded PUTs instead of answering."""
        self.cut_get_replies = 0
        """Send only half of this many GET replies."""

    def __enter__(self) -> "FaultProxy":
        super().__enter__()
        return self

    def puts(self, key: str) -> int:
        """How many PUTs of an object arrived."""
        return sum(method == "PUT" and path.endswith(f"/{key}") for method, path in self.requests)

    def fault(self, request: Request) -> Fault | Answer | None:
        self.requests.append((request.method, request.path))
        if answer := next(self.answers, None):
            return Answer(*answer)
        if request.method == "PUT" and self.lost_put_replies:
            self.lost_put_replies -= 1
            return Fault.SWALLOW
        if request.method == "GET" and self.cut_get_replies:
            self.cut_get_replies -= 1
            return Fault.TRUNCATE
        return None

    def edit(self, head: Head) -> Head:
        self.heads.append(head)
        if self.strip_if_none_match:
            head = head.without("if-none-match")
        return head.without("x-amz-meta-") if self.strip_metadata else head
