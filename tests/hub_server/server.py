"""The socket of the test Hub, its users, and the faults that tests ask for."""

import json
import secrets
import socket
import struct
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from tests.hub_server.calls import Answer, Call, User
from tests.hub_server.routes import ROUTES, route
from tests.hub_server.storage import HubError, Repo

WHERE = frozenset(function.__name__ for _, _, function in ROUTES)


@dataclass(frozen=True)
class Request:
    """One request as the server saw it; `status` is None where it was broken off."""

    method: str
    path: str
    where: str | None
    status: int | None
    token: bool
    size: int


@dataclass
class _Fault:
    """What goes wrong at a place, `left` times (None: always): a status, or a broken connection before or after the work."""

    where: str
    left: int | None
    status: int | None = None
    after: bool = False


class HubServer:
    """A Hub on loopback, while the `with` block runs.

    Args:
        token, user, organizations: of the first account; add others with `add_user`.
        lfs: False lets every file come in the commit itself, as a client with Xet switched on needs it (see the package).
        port: 0 takes a free one.

    Attributes:
        repos: `Repo` by id ("datasets/ORG/NAME" for a dataset). requests: what was asked, in order. page: entries of a tree page.

    Example:
        >>> from huggingface_hub import HfApi
        >>> with HubServer(user="owner") as hub:
        ...     hub.url.startswith("http://127.0.0.1:"), hub.repos
        (True, {})
    """

    def __init__(
        self, *, token: str = "hf_owner", user: str = "owner", organizations: tuple[str, ...] = ("org",), lfs: bool = True,
        port: int = 0,
    ) -> None:  # fmt: skip
        self.token, self.lfs, self.page = token, lfs, 1000
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.grants: dict[str, tuple[Repo, str, int]] = {}
        self.lock = threading.RLock()
        self._faults: list[_Fault] = []
        self.add_user(user, token=token, organizations=organizations)
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def add_user(self, name: str, *, token: str = "", organizations: tuple[str, ...] = (), role: str = "write") -> str:
        """Another account. Returns its token."""
        token = token or f"hf_{name}_{role}"
        self.users[token] = User(name, token, tuple(organizations), role)
        return token

    def break_at(self, where: str, *, times: int | None = 1, after: bool = False) -> None:
        """Close the connection in the middle of the next `times` requests (None: of all) of a kind (`WHERE`).

        The body is read by half and nothing is done; a download sends half of the file. `after`: all is done, and the answer is
        lost. The client tries some requests again by itself, after 1, 2, 4, … seconds.
        """
        self._add(_Fault(where, times, after=after))

    def fail_at(self, where: str, status: int, *, times: int | None = 1) -> None:
        """Answer the next `times` requests of a kind with `status`."""
        self._add(_Fault(where, times, status=status))

    def heal(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    def _add(self, fault: _Fault) -> None:
        if fault.where not in WHERE:
            raise ValueError(f"`where` must be one of {', '.join(sorted(WHERE))}, got {fault.where!r}.")
        self._faults.append(fault)

    def fault(self, where: str | None, method: str) -> _Fault | None:
        """What goes wrong with this request; a connection does not break in an answer without a body."""
        with self.lock:
            for fault in self._faults:
                if fault.where == where and fault.left != 0 and (fault.status or method != "HEAD"):
                    fault.left = None if fault.left is None else fault.left - 1
                    return fault
        return None

    def grant(self, repo: Repo, oid: str, size: int) -> str:
        """An address to which one object may be uploaded without a token."""
        key = secrets.token_hex(16)
        self.grants[key] = (repo, oid, size)
        return key

    def serve_forever(self) -> None:
        """Serve in this thread."""
        self._server.serve_forever(poll_interval=0.05)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.serve_forever, name="hub", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        # A client keeps connections open; on a port that is used again they would lead to this Hub, and not to the next.
        for connection in list(self._server.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    hub: HubServer

    def __init__(self, *args: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is a fault of this server, and shall be seen."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Broken(Exception):
    """The connection is to be cut."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args: Any) -> None:
        """Quiet: `hub.requests` tells."""

    def _serve(self) -> None:
        hub, target = self.server.hub, urlsplit(self.path)
        found = route(self.command, target.path)
        where = found[0].__name__ if found else None
        fault = hub.fault(where, self.command)
        noted, size = False, 0
        try:
            cut = fault is not None and fault.status is None and not fault.after
            body = self._body(half=cut and where != "resolve")
            size = len(body)
            try:
                if fault is not None and fault.status is not None:
                    raise HubError(fault.status, f"A fault that a test asked for at {where}")
                answer = self._answer(found, parse_qs(target.query, keep_blank_values=True), body)
            except HubError as error:
                answer = self._refusal(error)
            if fault is not None and fault.after:
                raise _Broken
            # Before the client hears of it, so that a test that looks right after finds it.
            status = None if cut else answer.status
            self._note(Request(self.command, self.path, where, status, "Authorization" in self.headers, size))
            noted = True
            self._send(answer, half=cut)
        except _Broken:
            if not noted:
                self._note(Request(self.command, self.path, where, None, "Authorization" in self.headers, size))
            self._cut()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _note(self, request: Request) -> None:
        with self.server.hub.lock:
            self.server.hub.requests.append(request)

    def _body(self, *, half: bool) -> bytes:
        """The request's body; by half, the connection breaks."""
        length = self.headers.get("Content-Length")
        if length is not None:
            body = self.rfile.read(int(length) // 2 if half else int(length))
        else:
            chunks = []
            while "chunked" in (self.headers.get("Transfer-Encoding") or ""):
                count = int(self.rfile.readline().split(b";")[0], 16)
                chunks.append(self.rfile.read(count))
                self.rfile.readline()
                if not count:
                    break
            body = b"".join(chunks)
        if half:
            raise _Broken
        return body

    def _answer(self, found: Any, query: dict[str, list[str]], body: bytes) -> Answer:
        """What the Hub says, or HubError."""
        hub = self.server.hub
        if found is None:
            code = "RepoNotFound" if self.path.startswith(("/api/models/", "/api/datasets/", "/api/spaces/")) else None
            raise HubError(404, f"Nothing is served at {self.command} {self.path}", code)
        function, parts = found
        given = self.headers.get("Authorization")
        user = hub.users.get(given.removeprefix("Bearer ")) if given else None
        if given and user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        kind, repo_id = parts.pop("kind", "models"), parts.pop("id", "")
        return function(Call(hub, self.command, query, self.headers, body, user, kind, repo_id, parts))

    def _refusal(self, error: HubError) -> Answer:
        """The answer with the headers that the client reads."""
        headers = {
            **error.headers,
            "X-Error-Message": error.message.encode("ascii", "replace").decode().replace("\n", " "),
        }
        if error.code:
            headers["X-Error-Code"] = error.code
        if self.headers.get("Accept") == "text/plain":
            listed = [found["message"] for found in error.body.get("errors", [])] or [error.message]
            return Answer("\n".join(listed).encode(), error.status, {**headers, "Content-Type": "text/plain"})
        return Answer(error.body, error.status, headers)

    def _send(self, answer: Answer, *, half: bool = False) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {
            "Content-Type": "application/json",
            **answer.headers,
            "Content-Length": str(len(body)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if half else body)
        if half:
            self.wfile.flush()
            raise _Broken

    def _cut(self) -> None:
        """No more on this connection; a half-sent upload is reset, so that the client does not wait for an answer."""
        self.close_connection = True
        if self.command != "GET":
            with suppress(OSError):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
