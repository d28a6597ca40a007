"""Who asks, repositories, their settings, branches and tags."""

import re
from urllib.parse import unquote

from tests.hub_server.calls import Answer, Call, User
from tests.hub_server.storage import HubError, Repo, check_path

NAME = re.compile(r"[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)


def whoami(call: Call) -> Answer:
    """The token's owner."""
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    user = call.user
    orgs = [
        {"type": "org", "id": name, "name": name, "fullname": name, "roleInOrg": "write"} for name in user.organizations
    ]
    token = {"displayName": "test", "role": user.role}
    return Answer(
        {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": orgs,
         "auth": {"type": "access_token", "accessToken": token}}
    )  # fmt: skip


def _named(call: Call) -> tuple[User, str]:
    """Who asks about which repository under /api/repos, with rights to its namespace."""
    user, values = call.member(), call.json()
    name, space, kind = (
        str(values.get("name")),
        str(values.get("organization") or user.name),
        values.get("type") or "model",
    )
    if kind not in ("model", "dataset", "space"):
        raise HubError(400, f"Invalid repo type: {kind}")
    odd = "--" in name or ".." in name or name.endswith(".git") or len(f"{space}/{name}") > 96
    if odd or not NAME.fullmatch(name) or not NAME.fullmatch(space):
        raise HubError(400, f"Invalid repo name: {space}/{name}")
    call.kind, call.id = f"{kind}s", f"{space}/{name}"
    if not user.belongs(call.id):
        raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{space}"')
    return user, kind


def create(call: Call) -> Answer:
    """A repository with the Hub's first commit (.gitattributes)."""
    user, kind = _named(call)
    values, url = call.json(), f"{call.hub.url}/{call.key}"
    with call.hub.lock:
        if call.key in call.hub.repos:
            raise HubError(409, f"You already created this {kind} repo: {call.id}", body={"url": url})
        private = values.get("visibility") == "private" or bool(values.get("private"))
        call.hub.repos[call.key] = Repo(call.id, kind, private=private, author=user.name)
    return Answer({"url": url, "name": call.id, "id": call.id})


def delete(call: Call) -> Answer:
    """Away with all of it."""
    _named(call)
    call.repo(write=True)
    del call.hub.repos[call.key]
    return Answer()


def settings(call: Call) -> Answer:
    """Private or public."""
    repo, values = call.repo(write=True), call.json()
    if "visibility" in values or "private" in values:
        repo.private = values.get("visibility") == "private" or bool(values.get("private"))
    return Answer({"private": repo.private})


def refs(call: Call) -> Answer:
    """Branches and tags."""
    repo = call.repo()
    branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in sorted(repo.branches.items())]
    tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in sorted(repo.tags.items())]
    return Answer({"branches": branches, "converts": [], "tags": tags, "pullRequests": []})


def branch(call: Call) -> Answer:
    """Start or end a branch."""
    repo, name = call.repo(write=True), unquote(call.parts["name"])
    with repo.lock:
        if call.method == "DELETE":
            if name not in repo.branches:
                raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
            if name == "main":
                raise HubError(403, "The default branch cannot be deleted")
            del repo.branches[name]
            return Answer()
        if name in repo.branches:
            raise HubError(409, f"Reference already exists: {name}")
        check_path(name)
        repo.branches[name] = repo.at(str(call.json().get("startingPoint") or "main")).oid
    return Answer(status=201)


def tag(call: Call) -> Answer:
    """Name a commit for good, or take the name away."""
    repo, name = call.repo(write=True), unquote(call.parts["name"])
    with repo.lock:
        if call.method == "DELETE":
            if repo.tags.pop(name, None) is None:
                raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
            return Answer()
        new = check_path(str(call.json().get("tag")))
        if new in repo.tags:
            raise HubError(409, f"Tag already exists: {new}")
        repo.tags[new] = repo.at(name).oid
    return Answer(status=201)
