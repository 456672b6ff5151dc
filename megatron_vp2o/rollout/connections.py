"""Connections for many requests at once to a few servers.

httpcore's pool looks at every connection and every request in it whenever a request begins or ends: with some hundreds in flight
that is most of what a client computes. Here each request takes a pool of one connection for itself and puts it back, so that the
cost of a request does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import httpx

Give = Callable[[], None]


class OneEach(httpx.AsyncBaseTransport):
    """A transport of one connection for each request under way. One that is free serves the next request to the same server,
    the last used first; whether it is still alive is its own business, as in any pool.

    Args:
        keep_s: how long an idle connection may be used again, seconds.
        verify: whether certificates are checked.
    """

    def __init__(self, *, keep_s: float, verify: bool) -> None:
        self._ssl = httpx.create_ssl_context(verify=verify)
        self._limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=keep_s)
        self._free: dict[tuple[str, str, int | None], list[httpx.AsyncHTTPTransport]] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See the base class."""
        url = request.url
        free = self._free.setdefault((url.scheme, url.host, url.port), [])
        transport = free.pop() if free else httpx.AsyncHTTPTransport(verify=self._ssl, limits=self._limits)
        try:
            response = await transport.handle_async_request(request)
        except BaseException:
            await transport.aclose()
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Lent(response.stream, transport, lambda: free.append(transport))
        return response

    async def aclose(self) -> None:
        """Close what is free."""
        for free in self._free.values():
            while free:
                await free.pop().aclose()


class _Lent(httpx.AsyncByteStream):
    """The body of a response; at its end the connection goes back."""

    def __init__(self, body: httpx.AsyncByteStream, transport: httpx.AsyncHTTPTransport, give: Give) -> None:
        self._body, self._transport, self._give = body, transport, give
        self._over = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._body:
            yield part

    async def aclose(self) -> None:
        if self._over:
            return
        self._over = True
        try:
            await self._body.aclose()
        except BaseException:
            await self._transport.aclose()
            raise
        self._give()
