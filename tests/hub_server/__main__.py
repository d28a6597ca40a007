"""`python -m tests.hub_server --port-file FILE`: a Hub of its own process, until it is ended. The token is `HF_TOKEN`.

With `-- COMMAND…` it serves while the command runs, whose environment points every client at it, and ends with its exit code.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tests.hub_server.server import HubServer


def main() -> None:
    """Serve, and say where: on the first line and, whole or not at all, in --port-file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--port-file", type=Path, help="the port is written to it")
    parser.add_argument("--user", default="owner")
    parser.add_argument("--organizations", nargs="*", default=["org"])
    parser.add_argument(
        "--no-lfs", action="store_true", help="every file in the commit: for clients with Xet switched on"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND…", help="serve while it runs")
    args = parser.parse_args()
    token = os.environ.get("HF_TOKEN", "hf_owner")
    hub = HubServer(
        token=token, user=args.user, organizations=tuple(args.organizations), lfs=not args.no_lfs, port=args.port
    )
    print(hub.url, flush=True)
    if args.port_file:
        with tempfile.NamedTemporaryFile("w", dir=args.port_file.parent, delete=False) as file:
            file.write(hub.url.rpartition(":")[2])
        os.replace(file.name, args.port_file)
    if not args.command:
        hub.serve_forever()
        return
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as home:
        theirs = {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": home, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        sys.exit(
            subprocess.run([word for word in args.command if word != "--"], env={**os.environ, **theirs}).returncode
        )


if __name__ == "__main__":
    main()
