"""A server that answers every request with as many bytes: ``python -m … bare_server BYTES``.

What an HTTP server in Python cannot do without, for `krea2_bench.micro.http` to compare with.
Prints its port, and ends with its standard input.
"""

import asyncio
import json
import socket
import sys

import pybase64
import uvicorn
from starlette.types import Receive, Scope, Send


def main() -> None:
    picture = bytes(int(sys.argv[1]))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        json.loads((await receive())["body"])
        answer = b'{"data":[{"b64_json":"' + pybase64.b64encode(picture) + b'"}]}'
        headers = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def serve() -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            config = uvicorn.Config(app, log_level="warning", lifespan="off", access_log=False)
            server = uvicorn.Server(config)
            print(listener.getsockname()[1], flush=True)
            serving = asyncio.create_task(server.serve([listener]))
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
            server.should_exit = True
            await serving

    asyncio.run(serve())


if __name__ == "__main__":
    main()
