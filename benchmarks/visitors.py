"""Visitors of a web service in a process of their own, who all come at once, and of whom some leave.

`python benchmarks/visitors.py PORT PATH COUNT SHARE SECONDS` opens a connection for each, sends one request on it, and
prints what became of each as JSON. The share of them who leave close their connections at random times in the given
seconds. Times are those of CLOCK_MONOTONIC, which all processes of a machine share.
"""

import asyncio
import json
import random
import sys
import time
from typing import Any

_TIMEOUT = 600.0
"""Seconds until a visitor gives up."""


async def visit(port: int, path: str, number: int, patience: float | None) -> dict[str, Any]:
    """Send a request and wait for its response, or leave after some seconds; return what happened."""
    visitor: dict[str, Any] = {"number": number, "came": time.monotonic(), "status": None, "left": False}
    try:
        async with asyncio.timeout(_TIMEOUT if patience is None else patience):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                request = f"POST {path}?prompt=visitor{number} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
                writer.write(request.encode())
                status, headers, body = await _read_response(reader)
            finally:
                writer.close()
    except TimeoutError:
        visitor["left"] = patience is not None
    except (OSError, EOFError):
        pass  # cut
    else:
        visitor |= {"status": status, "retry_after": headers.get("retry-after"), "body": body}
    visitor["ended"] = time.monotonic()
    return visitor


async def _read_response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], str]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    lines = head.split("\r\n")
    fields = (line.partition(":") for line in lines[1:])
    headers = {name.strip().lower(): value.strip() for name, _, value in fields}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return int(lines[0].split(" ", 2)[1]), headers, body.decode(errors="replace")


async def visit_all(port: int, path: str, count: int, share: float, seconds: float) -> list[dict[str, Any]]:
    """Let all visitors come at once; those who leave, and when, are the same in each run."""
    generator = random.Random(1)
    leaving = set(generator.sample(range(count), round(count * share)))
    patience = [generator.uniform(0, seconds) if number in leaving else None for number in range(count)]
    return await asyncio.gather(*(visit(port, path, number, patience[number]) for number in range(count)))


def main() -> None:
    port, path, count, share, seconds = sys.argv[1:]
    print(json.dumps(asyncio.run(visit_all(int(port), path, int(count), float(share), float(seconds)))))


if __name__ == "__main__":
    main()
