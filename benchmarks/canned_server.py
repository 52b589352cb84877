"""A rollout server without a model, to measure what the client alone costs.

It parses just enough HTTP to find where a request ends, and answers /generate at once with the same sound bytes every
time.

    python benchmarks/canned_server.py --rows 1 --tokens 32     # prints its address; serves until its input ends
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys

VERSION = "canned"
VOCAB_SIZE = 49152


def canned_answer(rows: int, tokens: int) -> bytes:
    """Return the body of an answer to /generate as SGLang's: ``rows`` rows of ``tokens`` tokens, with log-probs of full
    precision."""
    ids = [(7919 * position) % VOCAB_SIZE for position in range(tokens)]
    log_probs = [-abs(math.sin(position)) for position in range(tokens)]
    row = {
        "text": "x" * tokens,
        "output_ids": ids,
        "meta_info": {
            "id": "0" * 32,
            "finish_reason": {"type": "length", "length": tokens},
            "prompt_tokens": 1,
            "weight_version": VERSION,
            "completion_tokens": tokens,
            "cached_tokens": 0,
            "output_token_logprobs": [[value, token, None] for value, token in zip(log_probs, ids, strict=True)],
        },
    }
    return json.dumps([row] * rows).encode()


class CannedProtocol(asyncio.Protocol):
    """One connection, kept alive; whatever is asked gets the same answer."""

    def __init__(self, response: bytes):
        self.response = response
        self.received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (head := self.received.find(b"\r\n\r\n")) >= 0:
            length = 0
            for line in bytes(self.received[:head]).lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    length = int(line[15:])
            end = head + 4 + length
            if len(self.received) < end:
                return
            del self.received[:end]
            self.transport.write(self.response)


async def serve(rows: int, tokens: int) -> None:
    body = canned_answer(rows, tokens)
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: CannedProtocol(head.encode() + body), "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1, help="rows of an answer")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a row")
    options = parser.parse_args()
    asyncio.run(serve(options.rows, options.tokens))


if __name__ == "__main__":
    main()
