"""What a repository holds: info, trees, history, files."""

import hashlib
import re
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from tests.hub_server.calls import Answer, Call
from tests.hub_server.metadata import metadata
from tests.hub_server.storage import Commit, HubError


def info(call: Call) -> Answer:
    """A repository at a revision."""
    repo = call.repo()
    commit = repo.at(unquote(call.parts.get("revision") or "main"))
    blobs = bool(call.query.get("blobs"))
    siblings = []
    for path, blob in sorted(commit.files.items()):
        about = blob.describe(path)
        if "lfs" in about:
            about["lfs"] = {
                "sha256": about["lfs"]["oid"],
                "size": about["size"],
                "pointerSize": about["lfs"]["pointerSize"],
            }
        about = {"blobId": about["oid"], "size": about["size"], **({"lfs": about["lfs"]} if "lfs" in about else {})}
        siblings.append({"rfilename": path, **(about if blobs else {})})
    card = _card(commit)
    bases = card.get("base_model") or []
    bases = bases if isinstance(bases, list) else [bases]
    tags = [str(tag) for tag in card.get("tags") or []]
    tags += [f"license:{card['license']}"] if isinstance(card.get("license"), str) else []
    tags += [f"base_model:{base}" for base in bases]
    return Answer(
        {
            "_id": hashlib.sha1(call.key.encode()).hexdigest()[:24], "id": repo.id, "modelId": repo.id,
            "author": repo.id.partition("/")[0], "sha": commit.oid, "private": repo.private, "gated": False, "disabled": False,
            "lastModified": commit.date, "createdAt": repo.back_from(commit)[-1].date, "downloads": 0, "likes": 0,
            "tags": tags, "cardData": card, "siblings": siblings, "spaces": [],
            **{key: card[key] for key in ("pipeline_tag", "library_name", "model-index") if key in card},
        }
    )  # fmt: skip


def _card(commit: Commit) -> dict[str, Any]:
    """Metadata of the commit's card, {} without."""
    blob = commit.files.get("README.md")
    return metadata(blob.content.decode("utf-8", "replace")) if blob else {}


def tree(call: Call) -> Answer:
    """Files and folders below a path, page by page."""
    repo = call.repo()
    commit = repo.at(unquote(call.parts["revision"]))
    folder, recursive = (
        unquote(call.parts.get("path") or "").strip("/"),
        call.query.get("recursive", [""])[0].lower() == "true",
    )
    if folder and not commit.below(folder):
        raise HubError(404, f"{folder} does not exist on {commit.oid}", "EntryNotFound")
    start = len(folder) + 1 if folder else 0
    found: dict[str, dict[str, Any]] = {}
    for path, blob in commit.below(folder).items():
        steps = path[start:].split("/")
        for depth in range(1, len(steps)):
            if recursive or depth == 1:
                above = path[:start] + "/".join(steps[:depth])
                oid = hashlib.sha1(f"{commit.oid} {above}".encode()).hexdigest()
                found[above] = {"type": "directory", "oid": oid, "size": 0, "path": above}
        if recursive or len(steps) == 1:
            found[path] = blob.describe(path)
    entries = [found[path] for path in sorted(found)]
    first = int(call.query.get("cursor", ["0"])[0])
    last, headers = first + call.hub.page, {}
    if last < len(entries):
        kept = "".join(f"&{key}={quote(value[0])}" for key, value in call.query.items() if key != "cursor")
        address = f"{call.hub.url}/api/{call.kind}/{call.id}/tree/{call.parts['revision']}"
        address += f"/{quote(folder)}" if folder else ""
        headers["Link"] = f'<{address}?cursor={last}{kept}>; rel="next"'
    return Answer(entries[first:last], headers=headers)


def paths(call: Call) -> Answer:
    """What some paths are; those that are nothing are left out."""
    commit = call.repo().at(unquote(call.parts["revision"]))
    asked = parse_qs(call.body.decode()).get("paths", [])
    return Answer([commit.files[path].describe(path) for path in asked if path in commit.files])


def commits(call: Call) -> Answer:
    """History, the newest first."""
    repo = call.repo()
    return Answer(
        [
            {"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
            for c in repo.back_from(repo.at(unquote(call.parts["revision"])))
        ]
    )


def resolve(call: Call) -> Answer:
    """A file's bytes, or a range of them."""
    at = call.repo().at(unquote(call.parts["revision"]))
    path = unquote(call.parts["path"])
    blob = at.files.get(path)
    if blob is None:
        raise HubError(404, f"Entry not found: {path}", "EntryNotFound", **{"X-Repo-Commit": at.oid})
    headers = {
        "X-Repo-Commit": at.oid, "ETag": f'"{blob.sha256 or blob.oid}"', "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
    }  # fmt: skip
    size = len(blob.content)
    if blob.sha256:
        headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{blob.sha256}"'}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range") or "")
    if asked is None or call.method == "HEAD":
        return Answer(blob.content, headers=headers)
    first, last = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
    if first > last:
        raise HubError(416, f"Range {asked[0]} is outside of {size} bytes", **{"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    return Answer(blob.content[first : last + 1], 206, headers)
