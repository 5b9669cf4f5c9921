"""Runs the sample web until it is told to stop: `python -m pairmill.sample_web.serve`.

Prints one line of JSON, `{"base_urls": [...]}`, once it listens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys

from pairmill.sample_web.server import PortTakenError, SampleServer

PARENT_CHECK_S = 0.5


def main() -> int:
    """Returns the exit code: 0 when stopped, 2 when an address cannot be had."""
    options = _options()
    hosts = [host for host in options.hosts.split(",") if host]
    server = SampleServer(hosts, options.port, options.misbehave_timescale)
    try:
        asyncio.run(_serve(server, options.parent))
    except PortTakenError as error:
        print(f"sample web: {error}; end what listens there, or choose another --port (0 for any)", file=sys.stderr)
        return 2
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pairmill.sample_web.serve", description="Serve the sample web.")
    parser.add_argument("--hosts", default="127.0.0.1", help="addresses to listen on, separated by commas")
    parser.add_argument("--port", type=int, default=0, help="one port for all hosts; 0 chooses one for each")
    parser.add_argument("--misbehave-timescale", type=float, default=1.0, help="factor on every misbehaviour's seconds")
    parser.add_argument("--parent", type=int, help="stop when the process with this id is no longer the parent")
    options = parser.parse_args()
    if not 0 <= options.port <= 65535:
        parser.error(f"--port {options.port}: must be 0 to 65535")
    return options


async def _serve(server: SampleServer, parent: int | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    try:
        await server.start()
        print(json.dumps({"base_urls": server.base_urls}), flush=True)
        while not stop.is_set() and parent in (None, os.getppid()):
            try:
                await asyncio.wait_for(stop.wait(), PARENT_CHECK_S)
            except TimeoutError:
                continue
    finally:
        await server.stop()


if __name__ == "__main__":
    sys.exit(main())
