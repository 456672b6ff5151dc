"""Many requests over connections of their own: each gets its own answer, connections are used again, and broken ones are not."""

from __future__ import annotations

import asyncio
import random

import httpx
import pytest

from megatron_vp2o.rollout.connections import OneEach


class Echo:
    """Answers with the number that it was asked for; drops connections, and answers late, as the number says."""

    def __init__(self) -> None:
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                number = int(head.split(b" ")[1].decode().rpartition("/")[2])
                if number % 7 == 3:
                    break
                await asyncio.sleep(number % 5 / 500)
                body = str(number).encode() * 1000
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
                await writer.drain()
                if number % 11 == 5:
                    break  # it ends a connection that is idle, without a word
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@pytest.mark.parametrize("seed", range(5))
def test_every_request_gets_its_own_answer(seed: int) -> None:
    rng = random.Random(seed)

    async def go() -> tuple[int, int, int]:
        echo = Echo()
        server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        seen = {"good": 0, "broken": 0, "given up": 0}
        async with httpx.AsyncClient(transport=OneEach(keep_s=2.0, verify=False), trust_env=False) as http:
            gate = asyncio.Semaphore(20)

            async def ask(number: int, patience: float) -> None:
                async with gate:
                    try:
                        async with asyncio.timeout(patience):
                            answer = await http.get(f"http://127.0.0.1:{port}/{number}")
                    except httpx.HTTPError:
                        assert number % 7 == 3
                        seen["broken"] += 1
                    except TimeoutError:
                        seen["given up"] += 1
                    else:
                        assert answer.text == str(number) * 1000
                        seen["good"] += 1

            numbers = [rng.randrange(10_000) for _ in range(400)]
            await asyncio.gather(*(ask(number, rng.choice([30.0] * 9 + [0.001])) for number in numbers))
        server.close()
        assert sum(seen.values()) == 400 and min(seen.values()) > 0, seen
        return echo.connections, seen["broken"] + seen["given up"], sum(number % 11 == 5 for number in numbers)

    connections, failed, ended = asyncio.run(go())
    assert connections <= 20 + failed + ended, "no connection is opened while a sound one is free"


def test_a_dead_server_is_an_error_of_the_request() -> None:
    async def go() -> None:
        async with httpx.AsyncClient(transport=OneEach(keep_s=2.0, verify=False), trust_env=False) as http:
            with pytest.raises(httpx.ConnectError):
                await http.get("http://127.0.0.1:9/1")

    asyncio.run(go())
