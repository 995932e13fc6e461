"""The rig's client never takes an operation for undone that may have been done."""

from __future__ import annotations

import asyncio

from chaos_tests.client import Api

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


async def test_a_delete_that_left_on_a_kept_connection_is_unknown() -> None:
    """The node takes the request and dies: neither an answer, nor anyone who would take it again."""
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        while await reader.readuntil(b"\r\n\r\n"):
            asked += 1
            if asked == 2:
                server.close()
                writer.transport.abort()
                return
            writer.write(ANSWER)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    api = Api({"n1": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"}, None)
    try:
        assert (await api.call("n1", "DELETE", "/v1/a")).end == "ok"
        assert (await api.call("n1", "DELETE", "/v1/b")).end == "unknown"
    finally:
        await api.close()
        server.close()
    assert asked == 2
