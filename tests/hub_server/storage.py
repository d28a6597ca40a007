"""Repositories in memory: content by hash, trees as maps, history as a chain of commits.

blob   = sha1("blob SIZE\\0" + content)                       content of an LFS file: that of its pointer, and sha256(content)
commit = sha1(parent, paths and blobs, title, number)          so that the same story gives the same names
"""

import base64
import hashlib
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
LFS_PATTERNS = (
    "*.arrow *.bin *.ckpt *.ftz *.gz *.h5 *.joblib *.model *.msgpack *.npy *.npz *.onnx *.parquet *.pickle *.pkl *.pt *.pth "
    "*.safetensors saved_model/**/* *.tar *.tflite *.zip *tfevents*"
)
GIT_ATTRIBUTES = "".join(f"{one} filter=lfs diff=lfs merge=lfs -text\n" for one in LFS_PATTERNS.split()).encode()


class HubError(Exception):
    """An answer that is no success: `status`, the text in the body, and the code that the client maps to an exception."""

    def __init__(
        self, status: int, message: str, code: str | None = None, *, body: dict[str, Any] | None = None, **headers: str
    ):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.body = {"error": message, **(body or {})}
        self.headers = headers


def git_hash(content: bytes) -> str:
    """The name that git gives to `content`."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file: its bytes, its git name and, where it is stored as LFS, the SHA-256 of its bytes."""

    content: bytes = field(repr=False)
    oid: str
    sha256: str | None = None

    @classmethod
    def regular(cls, content: bytes) -> "Blob":
        """A file in git itself."""
        return cls(content, git_hash(content))

    @classmethod
    def large(cls, content: bytes, sha256: str) -> "Blob":
        """A file behind a pointer."""
        return cls(content, git_hash(pointer(sha256, len(content))), sha256)

    def describe(self, path: str) -> dict[str, Any]:
        """As in a tree listing."""
        answer: dict[str, Any] = {"type": "file", "oid": self.oid, "size": len(self.content), "path": path}
        if self.sha256 is not None:
            size = len(self.content)
            answer["lfs"] = {"oid": self.sha256, "size": size, "pointerSize": len(pointer(self.sha256, size))}
        return answer


def pointer(sha256: str, size: int) -> bytes:
    """What git holds of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class Commit:
    """A state of a repository: `files` maps paths to blobs."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    number: int
    files: dict[str, Blob] = field(repr=False)

    @property
    def date(self) -> str:
        """No clock: the n-th commit of a repository is n seconds after the server's epoch."""
        return (EPOCH + timedelta(seconds=self.number)).strftime("%Y-%m-%dT%H:%M:%S.000Z")

    def below(self, folder: str) -> dict[str, Blob]:
        """The files in a folder, at any depth; "" is the whole tree."""
        start = f"{folder}/" if folder else ""
        return {path: blob for path, blob in self.files.items() if path.startswith(start)}


def check_path(path: Any) -> str:
    """A path that a repository may hold. Raises HubError 400."""
    parts = path.split("/") if isinstance(path, str) else [""]
    odd = any(part in ("", ".", "..") or part.lower() == ".git" or len(part.encode()) > 255 for part in parts)
    if odd or "\\" in path or any(ord(char) < 32 for char in path):
        raise HubError(400, f"Invalid path in repo: {path!r}")
    return path


class Repo:
    """One repository. Change it only while holding `lock`."""

    def __init__(self, repo_id: str, repo_type: str, *, private: bool, author: str) -> None:
        self.id, self.type, self.private, self.author = repo_id, repo_type, private, author
        self.lock = threading.RLock()
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        first = {".gitattributes": Blob.regular(GIT_ATTRIBUTES)}
        self.branches["main"] = self._add(None, first, "initial commit", "", author).oid

    @property
    def head(self) -> Commit:
        """The last commit of main."""
        return self.commits[self.branches["main"]]

    @property
    def files(self) -> dict[str, bytes]:
        """What main holds, for assertions."""
        return {path: blob.content for path, blob in self.head.files.items()}

    @property
    def history(self) -> list[Commit]:
        """Commits of main, the newest first."""
        return self.back_from(self.head)

    def back_from(self, commit: Commit | None) -> list[Commit]:
        """`commit` and what it stands on."""
        chain = []
        while commit is not None:
            chain.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return chain

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a (start of a) name stands for. Raises HubError 404."""
        name = self.branches.get(revision) or self.tags.get(revision)
        if name is None and len(revision) >= 7:
            found = [oid for oid in self.commits if oid.startswith(revision)]
            name = found[0] if len(found) == 1 else None
        if name is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[name]

    def commit(
        self, branch: str, operations: list[tuple[str, dict[str, Any]]], *, title: str, message: str, author: str,
        parent: str | None = None, check: Any = None,
    ) -> Commit:  # fmt: skip
        """Add a commit to `branch`: all operations or none. One that changes nothing keeps the head.

        Args:
            operations: (key, value) as the client sends them. parent: what the head must be.
            check: called with the new files before they are kept; raises HubError.
        """
        with self.lock:
            if branch not in self.branches:
                self.at(branch)  # 404 where nothing has that name
                raise HubError(400, f"Cannot commit to {branch!r}: it is no branch")
            head = self.commits[self.branches[branch]]
            if parent is not None and not head.oid.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for key, value in operations:
                self._apply(files, key, value)
            for path in files:
                above = path.rpartition("/")[0]
                while above:
                    if above in files:
                        raise HubError(400, f"Invalid path in repo: {path!r}, because {above!r} is a file")
                    above = above.rpartition("/")[0]
            if check is not None:
                check(files)
            if files == head.files:
                return head
            commit = self._add(head, files, title, message, author)
            self.branches[branch] = commit.oid
            return commit

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        """One operation on a tree."""
        path = check_path(str(value.get("path")).rstrip("/") if key == "deletedFolder" else value.get("path"))
        if key == "file":
            content = value.get("content", "")
            decode = value.get("encoding") == "base64"
            files[path] = Blob.regular(base64.b64decode(content) if decode else content.encode())
        elif key == "lfsFile":
            oid, size = value.get("oid"), value.get("size")
            if oid not in self.objects:
                raise HubError(400, f"LFS pointer of {path!r} points to an object that was not uploaded: {oid}")
            if size not in (None, len(self.objects[oid])):
                raise HubError(
                    400, f"LFS pointer of {path!r} names {size} bytes, the object has {len(self.objects[oid])}"
                )
            files[path] = Blob.large(self.objects[oid], oid)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [path] if key == "deletedFile" else [name for name in files if name.startswith(f"{path}/")]
            if not gone or any(name not in files for name in gone):
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f"Unknown operation: {key!r}")

    def _add(self, parent: Commit | None, files: dict[str, Blob], title: str, message: str, author: str) -> Commit:
        number = len(self.commits)
        story = [parent.oid if parent else "", self.type, self.id, title, message, author, str(number)]
        story += [f"{path} {files[path].oid}" for path in sorted(files)]
        oid = hashlib.sha1("\0".join(story).encode()).hexdigest()
        commit = Commit(oid, parent.oid if parent else None, title, message, author, number, files)
        self.commits[oid] = commit
        return commit
