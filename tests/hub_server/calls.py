"""A request to the Hub and its answer, and who may do what."""

import json
from dataclasses import dataclass, field
from typing import Any

from tests.hub_server.storage import HubError, Repo


@dataclass(frozen=True)
class User:
    """Who holds a token, and what it may do: `role` is "write" or "read"."""

    name: str
    token: str
    organizations: tuple[str, ...] = ()
    role: str = "write"

    def belongs(self, repo_id: str) -> bool:
        """Whether the namespace is theirs."""
        return repo_id.partition("/")[0] in (self.name, *self.organizations)


@dataclass
class Call:
    """A request, and the parts of its path that the route names."""

    hub: Any
    method: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    user: User | None
    kind: str = "models"
    id: str = ""
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The repository in `hub.repos`: its id, with datasets/ or spaces/ before it where it is one."""
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    def json(self) -> dict[str, Any]:
        """The body. Raises HubError 400."""
        try:
            values = json.loads(self.body)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise HubError(400, "The body must be a JSON object")
        return values

    def member(self) -> User:
        """Whoever asks, with a token that may write."""
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if self.user.role != "write":
            raise HubError(403, "Forbidden: this token may only read. Use a token with the write role")
        return self.user

    def repo(self, *, write: bool = False) -> Repo:
        """The repository, where the asker may see it (and change it). Raises HubError."""
        repo = self.hub.repos.get(self.key)
        mine = self.user is not None and self.user.belongs(self.id)
        if repo is None or (repo.private and not mine):
            status = 401 if self.user is None else 404
            raise HubError(status, "Repository not found", "RepoNotFound")
        if write:
            self.member()
            if not mine:
                raise HubError(403, f"Forbidden: you have no write access to {self.id}")
        return repo


@dataclass
class Answer:
    """A success: JSON or bytes."""

    body: Any = field(default_factory=dict)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
