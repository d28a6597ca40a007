"""An upload, in its order: validate, preupload, batch, lfs, verify, commit."""

import base64
import fnmatch
import hashlib
import json
import re
from typing import Any
from urllib.parse import unquote

from tests.hub_server.calls import Answer, Call
from tests.hub_server.metadata import README_BYTES, check_card
from tests.hub_server.storage import Blob, HubError, check_path

LARGE = 10 << 20
"""From this size on a file must be LFS (the Hub's documented limit for files in git)."""


def validate(call: Call) -> Answer:
    """A card before it is uploaded; needs no token."""
    values = call.json()
    _check_readme(str(values.get("content", "")).encode(), str(values.get("repoType") or "model"))
    return Answer({"errors": [], "warnings": [{"message": m} for m in check_card(str(values.get("content", "")))[1]]})


def _check_readme(content: bytes, repo_type: str) -> None:
    """Raises HubError for a card that the Hub refuses."""
    if len(content) > README_BYTES:
        raise HubError(413, f"README.md must be at most {README_BYTES} bytes, got {len(content)}")
    try:
        errors = check_card(content.decode(), repo_type)[0]
    except UnicodeDecodeError:
        errors = ["README.md must be UTF-8"]
    if errors:
        listed = [{"message": message} for message in errors]
        raise HubError(400, "Invalid metadata in README.md", body={"errors": listed, "warnings": []})


def preupload(call: Call) -> Answer:
    """How each file must come: LFS or in the commit; what stands there now; what .gitignore leaves out."""
    repo, values = call.repo(write=True), call.json()
    head = repo.at(unquote(call.parts["revision"]))
    attributes = head.files.get(".gitattributes")
    patterns = [
        line.split()[0]
        for line in (attributes.content.decode() if attributes else "").splitlines()
        if "filter=lfs" in line
    ]
    ignored = values.get("gitIgnore")
    if ignored is None and ".gitignore" in head.files:
        ignored = head.files[".gitignore"].content.decode()
    files = []
    for about in values.get("files", []):
        path = check_path(about.get("path"))
        binary = _binary(base64.b64decode(about.get("sample", "")))
        large = call.hub.lfs and (
            about.get("size", 0) >= LARGE or binary or any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
        )
        there = head.files.get(path)
        answer = {
            "path": path,
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": _ignored(path, ignored or ""),
        }
        if there is not None:
            answer["oid"] = there.sha256 if large and there.sha256 else there.oid
        files.append(answer)
    return Answer({"files": files, "commitOid": head.oid})


def _binary(sample: bytes) -> bool:
    """No text: a zero byte, or no UTF-8 but for a character cut off at the end."""
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        return b"\0" in sample or error.start < len(sample) - 3 or len(sample) < 512
    return b"\0" in sample


def _ignored(path: str, rules: str) -> bool:
    """.gitignore: the last rule that fits decides; folders end with "/", "!" takes back."""
    verdict = False
    for line in rules.splitlines():
        rule = line.strip()
        if not rule or rule.startswith("#"):
            continue
        back, rule = rule.startswith("!"), rule.lstrip("!")
        steps = path.split("/")
        names = ["/".join(steps[: i + 1]) for i in range(len(steps))]
        names = names[:-1] if rule.endswith("/") else names
        bare = rule.strip("/")
        if any(fnmatch.fnmatchcase(n if "/" in rule.rstrip("/") else n.rpartition("/")[2], bare) for n in names):
            verdict = not back
    return verdict


def batch(call: Call) -> Answer:
    """Where LFS objects go; those that are there need nothing."""
    repo, values = call.repo(write=True), call.json()
    if values.get("operation") != "upload" or values.get("hash_algo", "sha256") != "sha256":
        raise HubError(422, "Only uploads by SHA-256 are served")
    objects = []
    for about in values.get("objects", []):
        oid, size = str(about.get("oid")), about.get("size")
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if not re.fullmatch(r"[0-9a-f]{64}", oid) or not isinstance(size, int) or size < 0:
            answer = {
                "oid": oid,
                "size": 0,
                "error": {"code": 422, "message": "an object needs its SHA-256 and its size"},
            }
        elif oid not in repo.objects:
            address = f"{call.hub.url}/lfs-upload/{call.hub.grant(repo, oid, size)}"
            verify = f"{call.hub.url}/{call.key}.git/info/lfs/objects/verify"
            answer["actions"] = {"upload": {"href": address}, "verify": {"href": verify}}
        objects.append(answer)
    return Answer({"transfer": "basic", "objects": objects})


def lfs(call: Call) -> Answer:
    """An object, at the address that `batch` gave: no token, but it must be what was announced."""
    granted = call.hub.grants.get(call.parts["grant"])
    if granted is None:
        raise HubError(403, "This upload address is unknown")
    repo, oid, size = granted
    if len(call.body) != size:
        raise HubError(400, f"The object must have {size} bytes, got {len(call.body)}")
    found = hashlib.sha256(call.body).hexdigest()
    if found != oid:
        raise HubError(400, f"The object's SHA-256 must be {oid}, got {found}")
    with repo.lock:
        repo.objects[oid] = call.body
    return Answer()


def verify(call: Call) -> Answer:
    """Whether an object has arrived."""
    repo, values = call.repo(write=True), call.json()
    there = repo.objects.get(str(values.get("oid")))
    if there is None or len(there) != values.get("size"):
        raise HubError(404, "The object was not uploaded")
    return Answer()


def commit(call: Call) -> Answer:
    """Files, LFS pointers and deletions, one JSON object a line; everything or nothing."""
    repo = call.repo(write=True)
    if call.query.get("create_pr"):
        raise HubError(400, "Pull requests are not served by this test server")
    try:
        lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
        steps = [(str(line["key"]), dict(line["value"])) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(400, f"A commit must be lines of JSON with key and value: {error}") from error
    header = dict(steps[0][1]) if steps and steps[0][0] == "header" else {}
    if not header.get("summary"):
        raise HubError(400, "A commit needs a summary")

    def check(files: dict[str, Blob]) -> None:
        if "README.md" in files:
            _check_readme(files["README.md"].content, repo.type)

    assert call.user is not None
    made = repo.commit(
        unquote(call.parts["revision"]), steps[1:], title=header["summary"], message=header.get("description", ""),
        author=call.user.name, parent=header.get("parentCommit"), check=check,
    )  # fmt: skip
    url = f"{call.hub.url}/{call.key}/commit/{made.oid}"
    return Answer({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})
