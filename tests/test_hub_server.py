"""The test Hub against the real client: what goes up comes down, what the Hub refuses is refused, a fault leaves no commit."""

import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub_server import HubServer
from tests.hub_server.client import use
from tests.hub_server.metadata import LICENSES, README_BYTES, check_card
from tests.hub_server.storage import Repo
from tests.hub_server.uploads import LARGE

REPO = "owner/model"
CARD = "---\nlicense: mit\ntags:\n- backdoor-defense\n---\n# A model\n"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def api(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HfApi:
    """The owner's client, with one empty repository."""
    client = use(hub, monkeypatch, cache=tmp_path / "cache")
    client.create_repo(REPO)
    return client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A text, a card, weights and a plot, some below a folder with a name that needs quoting."""
    place = tmp_path / "folder"
    below = place / "é & 100%" / "deep"
    below.mkdir(parents=True)
    (place / "README.md").write_text(CARD)
    (place / "empty.txt").write_bytes(b"")
    (below / "one word.txt").write_text("wörd")
    (place / "model.safetensors").write_bytes(bytes(range(256)) * 999)
    (place / "plot.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return place


def contents(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, without what git and the client add."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes() for name, path in files.items() if not name.startswith((".cache/", ".gitattributes"))
    }


def ask(hub: HubServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes, Any]:
    """A request by another client than huggingface_hub's."""
    address = path if path.startswith("http") else hub.url + path
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers.setdefault("Authorization", f"Bearer {hub.token}")
    request = urllib.request.Request(address, data, headers, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def commit(hub: HubServer, *operations: tuple[str, dict[str, Any]], **header: str) -> tuple[int, bytes, Any]:
    """A commit as the client would send it, but with whatever it would not send."""
    lines = [("header", {"summary": "by hand", **header}), *operations]
    body = b"\n".join(json.dumps({"key": key, "value": value}).encode() for key, value in lines)
    return ask(hub, "POST", f"/api/models/{REPO}/commit/main", body)


def grant(hub: HubServer, content: bytes, *, size: int | None = None) -> tuple[str, str]:
    """SHA-256 of `content`, and the address where it may be put."""
    oid = hashlib.sha256(content).hexdigest()
    objects = [{"oid": oid, "size": len(content) if size is None else size}]
    answer = ask(hub, "POST", f"/{REPO}.git/info/lfs/objects/batch", {"operation": "upload", "objects": objects})
    return oid, json.loads(answer[1])["objects"][0]["actions"]["upload"]["href"]


def status(error: pytest.ExceptionInfo[Any]) -> int:
    return error.value.response.status_code


class TestRoundTrip:
    def test_what_goes_up_comes_down(self, hub: HubServer, api: HfApi, folder: Path, tmp_path: Path) -> None:
        made = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="all of it")
        assert [one.title for one in hub.repos[REPO].history] == ["all of it", "initial commit"]
        assert made.oid == api.model_info(REPO).sha == hub.repos[REPO].head.oid
        assert contents(Path(snapshot_download(REPO, local_dir=tmp_path / "there"))) == contents(folder)
        assert contents(Path(snapshot_download(REPO))) == contents(folder)

    def test_names_of_blobs_are_gits_and_sha256(self, hub: HubServer, api: HfApi, folder: Path) -> None:
        api.upload_folder(repo_id=REPO, folder_path=folder)
        found = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
        weights = (folder / "model.safetensors").read_bytes()
        assert found["model.safetensors"].lfs.sha256 == hashlib.sha256(weights).hexdigest()
        assert found["model.safetensors"].lfs.size == found["model.safetensors"].size == len(weights)
        git = subprocess.run(
            ["git", "hash-object", "--no-filters", folder / "README.md"], capture_output=True, text=True
        )
        assert found["README.md"].blob_id == git.stdout.strip()
        assert {path for path, entry in found.items() if getattr(entry, "lfs", None)} == {
            "model.safetensors",
            "plot.png",
        }

    def test_the_same_again_changes_nothing(self, hub: HubServer, api: HfApi, folder: Path) -> None:
        first = api.upload_folder(repo_id=REPO, folder_path=folder)
        sent = len(hub.requests)
        again = api.upload_folder(repo_id=REPO, folder_path=folder)
        assert again.oid == first.oid
        assert {"lfs", "commit"}.isdisjoint(request.where for request in hub.requests[sent:])
        answer = commit(hub, ("file", {"path": "README.md", "content": CARD}))
        assert json.loads(answer[1])["commitOid"] == first.oid

    def test_the_same_story_gives_the_same_names(self, api: HfApi, folder: Path) -> None:
        first = api.upload_folder(repo_id=REPO, folder_path=folder)
        with HubServer() as other:
            twin = HfApi(endpoint=other.url, token=other.token)
            twin.create_repo(REPO)
            assert twin.upload_folder(repo_id=REPO, folder_path=folder).oid == first.oid

    def test_a_card_pushed_is_the_card_loaded(self, api: HfApi) -> None:
        ModelCard(CARD).push_to_hub(REPO)
        assert str(ModelCard.load(REPO)) == CARD
        assert api.model_info(REPO).card_data.license == "mit"
        assert {"backdoor-defense", "license:mit"} <= set(api.model_info(REPO).tags)

    def test_tree_in_pages_is_the_tree(self, hub: HubServer, api: HfApi) -> None:
        names = [f"{folder}/{i}.txt" for folder in ("a", "b/c", "b/cd") for i in range(4)]
        api.create_commit(REPO, [CommitOperationAdd(name, name.encode()) for name in names], commit_message="files")
        hub.page = 3
        found = [entry.path for entry in api.list_repo_tree(REPO, recursive=True)]
        assert found == sorted([".gitattributes", "a", "b", "b/c", "b/cd", *names])
        assert [entry.path for entry in api.list_repo_tree(REPO)] == [".gitattributes", "a", "b"]
        assert [entry.path for entry in api.list_repo_tree(REPO, "b/c")] == names[4:8]
        assert [entry.path for entry in api.get_paths_info(REPO, ["a/1.txt", "none"])] == ["a/1.txt"]

    def test_a_range_is_that_part(self, hub: HubServer, api: HfApi) -> None:
        api.upload_file(repo_id=REPO, path_or_fileobj=b"0123456789", path_in_repo="a.txt")
        where = f"/{REPO}/resolve/main/a.txt"
        code, body, headers = ask(hub, "GET", where, Range="bytes=3-5")
        assert (code, body, headers["Content-Range"]) == (206, b"345", "bytes 3-5/10")
        assert ask(hub, "GET", where, Range="bytes=7-")[1] == b"789"
        assert ask(hub, "GET", where, Range="bytes=10-")[0] == 416
        assert ask(hub, "HEAD", where)[2]["Content-Length"] == "10"

    def test_what_a_file_is_stands_in_the_headers(self, hub: HubServer, api: HfApi) -> None:
        operations = [CommitOperationAdd("a.txt", b"text"), CommitOperationAdd("b.safetensors", b"weights")]
        made = api.create_commit(REPO, operations, commit_message="x").oid
        text, weights = (ask(hub, "HEAD", f"/{REPO}/resolve/main/{n}")[2] for n in ("a.txt", "b.safetensors"))
        assert text["X-Repo-Commit"] == weights["X-Repo-Commit"] == made
        assert (
            text["ETag"] == f'"{hashlib.sha1(b"blob 4" + bytes(1) + b"text").hexdigest()}"'
            and not text["X-Linked-ETag"]
        )
        assert (
            weights["X-Linked-ETag"] == f'"{hashlib.sha256(b"weights").hexdigest()}"'
            and weights["X-Linked-Size"] == "7"
        )

    def test_branches_and_tags_hold_their_commits(self, hub: HubServer, api: HfApi, tmp_path: Path) -> None:
        first = api.upload_file(repo_id=REPO, path_or_fileobj=b"1", path_in_repo="a.txt").oid
        api.create_branch(REPO, branch="try/this")
        api.create_tag(REPO, tag="v1")
        api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="a.txt", revision="try/this")
        assert hub.repos[REPO].files["a.txt"] == b"1"
        assert Path(api.hf_hub_download(REPO, "a.txt", revision="try/this")).read_bytes() == b"2"
        assert Path(api.hf_hub_download(REPO, "a.txt", revision=first)).read_bytes() == b"1"
        found = api.list_repo_refs(REPO)
        assert [ref.name for ref in found.branches] == ["main", "try/this"]
        assert [(ref.name, ref.target_commit) for ref in found.tags] == [("v1", first)]
        assert [one.commit_id for one in api.list_repo_commits(REPO)][0] == first
        with pytest.raises(HfHubHTTPError):
            api.create_branch(REPO, branch="try/this")

    def test_deleted_files_are_gone(self, hub: HubServer, api: HfApi) -> None:
        api.create_commit(
            REPO, [CommitOperationAdd(n, b"x") for n in ("a/b", "a/c", "ab", "d")], commit_message="files"
        )
        api.create_commit(
            REPO,
            [CommitOperationDelete("a/"), CommitOperationDelete("d"), CommitOperationAdd("e", b"")],
            commit_message="x",
        )
        assert set(hub.repos[REPO].files) == {".gitattributes", "ab", "e"}
        with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
            api.delete_file("none", REPO)

    def test_types_are_worlds_of_their_own(self, hub: HubServer, api: HfApi) -> None:
        api.create_repo(REPO, repo_type="dataset", private=True)
        api.create_repo(REPO, repo_type="space", space_sdk="static")
        api.upload_file(repo_id=REPO, path_or_fileobj=b"{}", path_in_repo="rows.json", repo_type="dataset")
        assert set(hub.repos) == {REPO, f"datasets/{REPO}", f"spaces/{REPO}"}
        assert Path(api.hf_hub_download(REPO, "rows.json", repo_type="dataset")).read_bytes() == b"{}"
        api.delete_repo(REPO)
        assert not api.repo_exists(REPO) and api.repo_exists(REPO, repo_type="dataset")

    def test_gitignore_keeps_files_out(self, hub: HubServer, api: HfApi) -> None:
        names = ("a.log", "keep.log", "build/x", "b.txt")
        rules = CommitOperationAdd(".gitignore", b"# rules\n*.log\n!keep.log\nbuild/\n")
        api.create_commit(REPO, [rules, *(CommitOperationAdd(name, b"x") for name in names)], commit_message="x")
        assert set(hub.repos[REPO].files) == {".gitattributes", ".gitignore", "keep.log", "b.txt"}

    def test_large_text_is_lfs(self, hub: HubServer, api: HfApi) -> None:
        api.upload_file(repo_id=REPO, path_or_fileobj=b"x" * LARGE, path_in_repo="rows.csv")
        api.upload_file(repo_id=REPO, path_or_fileobj=b"x" * 99, path_in_repo="few.csv")
        files = hub.repos[REPO].head.files
        assert files["rows.csv"].sha256 and not files["few.csv"].sha256

    def test_without_lfs_a_client_with_xet_gets_through(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
    ) -> None:
        with HubServer(lfs=False) as hub:
            api = use(hub, monkeypatch, cache=tmp_path / "cache")
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
            api.create_repo(REPO)
            api.upload_folder(repo_id=REPO, folder_path=folder)
            files = {path: content for path, content in hub.repos[REPO].files.items() if path != ".gitattributes"}
            assert files == contents(folder)

    def test_many_at_once(self, hub: HubServer, api: HfApi) -> None:
        def upload(i: int) -> str:
            return api.upload_file(repo_id=REPO, path_or_fileobj=bytes([i]) * 5000, path_in_repo=f"{i}.bin").oid

        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(upload, range(24)))
        repo = hub.repos[REPO]
        assert {path: content[0] for path, content in repo.files.items() if path != ".gitattributes"} == {
            f"{i}.bin": i for i in range(24)
        }
        assert sorted(made) == sorted(one.oid for one in repo.history[:-1])

    def test_no_commit_overtakes_another(self) -> None:
        repo = Repo(REPO, "model", private=False, author="owner")

        def slowly(i: int) -> str:
            operations = [("file", {"path": f"{i}.txt", "content": str(i)})]
            check = lambda files: time.sleep(0.002)  # noqa: E731
            return repo.commit("main", operations, title=str(i), message="", author="owner", check=check).oid

        with ThreadPoolExecutor(8) as pool:
            made = set(pool.map(slowly, range(24)))
        assert made == {one.oid for one in repo.history[:-1]} and len(made) == 24
        assert [len(one.files) for one in repo.history] == list(range(25, 0, -1))

    def test_a_closed_server_keeps_no_connection(
        self, api: HfApi, hub: HubServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with HubServer(user="first") as first:
            assert HfApi(endpoint=first.url, token=first.token).whoami()["name"] == "first"
        # The kernel gives the port again; the client's pool still knows the address.
        with HubServer(user="second", port=int(first.url.rpartition(":")[2])) as second:
            assert HfApi(endpoint=second.url, token=second.token).whoami()["name"] == "second"


class TestRights:
    def test_who_asks(self, hub: HubServer, api: HfApi) -> None:
        assert api.whoami()["name"] == "owner"
        assert [org["name"] for org in api.whoami()["orgs"]] == ["org"]
        assert api.create_repo("org/model").repo_id == "org/model"

    @pytest.mark.parametrize("token", ["hf_wrong", False])
    def test_no_or_wrong_token(self, hub: HubServer, api: HfApi, folder: Path, token: Any) -> None:
        other = HfApi(endpoint=hub.url, token=token)
        for work in (
            partial(other.create_repo, "owner/new"),
            partial(other.upload_folder, repo_id=REPO, folder_path=folder),
            partial(other.update_repo_settings, REPO, private=True),
            partial(other.delete_repo, REPO),
        ):
            with pytest.raises(HfHubHTTPError) as error:
                work()
            assert status(error) == 401
        assert set(hub.repos) == {REPO} and len(hub.repos[REPO].history) == 1

    def test_a_wrong_token_is_worse_than_none(self, hub: HubServer, api: HfApi) -> None:
        with pytest.raises(HfHubHTTPError, match="(?i)invalid user token"):
            HfApi(endpoint=hub.url, token="hf_wrong").whoami()
        assert HfApi(endpoint=hub.url, token=False).model_info(REPO).id == REPO
        with pytest.raises(HfHubHTTPError, match="Invalid credentials") as error:
            HfApi(endpoint=hub.url, token="hf_wrong").model_info(REPO)
        assert status(error) == 401

    def test_no_right_to_write(self, hub: HubServer, api: HfApi, folder: Path) -> None:
        for token in (hub.add_user("other"), hub.add_user("owner", role="read")):
            other = HfApi(endpoint=hub.url, token=token)
            for work in (
                partial(other.create_repo, "org/new"),
                partial(other.upload_folder, repo_id=REPO, folder_path=folder),
                partial(other.update_repo_settings, REPO, private=True),
                partial(other.create_branch, REPO, branch="b"),
            ):
                with pytest.raises(HfHubHTTPError, match="403 Forbidden") as error:
                    work()
                assert status(error) == 403
            assert other.model_info(REPO).id == REPO
        assert set(hub.repos) == {REPO} and not hub.repos[REPO].private

    def test_private_is_hidden(self, hub: HubServer, api: HfApi) -> None:
        api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="a.txt")
        api.update_repo_settings(REPO, private=True)
        assert api.model_info(REPO).private
        for token, code in ((False, 401), (hub.add_user("other"), 404)):
            other = HfApi(endpoint=hub.url, token=token)
            for work in (
                partial(other.model_info, REPO),
                partial(other.upload_file, repo_id=REPO, path_or_fileobj=b"", path_in_repo="b"),
            ):
                with pytest.raises(RepositoryNotFoundError) as error:
                    work()
                assert status(error) == code
            assert (
                ask(hub, "GET", f"/{REPO}/resolve/main/a.txt", Authorization=f"Bearer {token}" if token else "")[0]
                == code
            )
        member = HfApi(endpoint=hub.url, token=hub.add_user("member", organizations=("org",)))
        api.create_repo("org/secret", private=True)
        assert member.model_info("org/secret").private

    def test_a_name_is_taken_once(self, hub: HubServer, api: HfApi) -> None:
        with pytest.raises(HfHubHTTPError) as error:
            api.create_repo(REPO)
        assert status(error) == 409
        assert api.create_repo(REPO, exist_ok=True).repo_id == REPO

    @pytest.mark.parametrize("name", ["a--b", "a..b", "a.git", ".a", "a-", "ä", "a b", "a/b", "", "x" * 97])
    def test_bad_names(self, hub: HubServer, name: str) -> None:
        code, body, _ = ask(hub, "POST", "/api/repos/create", {"name": name, "organization": "owner", "type": "model"})
        assert code == 400 and "Invalid repo name" in json.loads(body)["error"]
        assert not hub.repos

    def test_what_is_not_there(self, api: HfApi) -> None:
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("owner/none")
        with pytest.raises(RepositoryNotFoundError):
            api.dataset_info(REPO)
        with pytest.raises(RevisionNotFoundError):
            api.model_info(REPO, revision="none")
        with pytest.raises(RevisionNotFoundError):
            api.upload_file(repo_id=REPO, path_or_fileobj=b"", path_in_repo="a", revision="none")
        with pytest.raises(EntryNotFoundError):
            api.hf_hub_download(REPO, "none.txt")
        with pytest.raises(EntryNotFoundError):
            list(api.list_repo_tree(REPO, "none"))


class TestUploads:
    def test_another_content_than_announced(self, hub: HubServer, api: HfApi) -> None:
        oid, address = grant(hub, b"announced")
        for content in (b"ANNOUNCED", b"announced twice", b""):
            assert ask(hub, "PUT", address, content, Authorization="")[0] == 400
        assert not hub.repos[REPO].objects
        code, body, _ = commit(hub, ("lfsFile", {"path": "a.bin", "algo": "sha256", "oid": oid, "size": 9}))
        assert code == 400 and b"not uploaded" in body
        assert ask(hub, "PUT", address, b"announced", Authorization="")[0] == 200
        assert commit(hub, ("lfsFile", {"path": "a.bin", "algo": "sha256", "oid": oid, "size": 8}))[0] == 400
        assert commit(hub, ("lfsFile", {"path": "a.bin", "algo": "sha256", "oid": oid, "size": 9}))[0] == 200
        assert hub.repos[REPO].files["a.bin"] == b"announced"

    def test_an_announced_size_that_is_wrong(self, hub: HubServer, api: HfApi) -> None:
        _, address = grant(hub, b"announced", size=8)
        assert ask(hub, "PUT", address, b"announced", Authorization="")[0] == 400
        assert ask(hub, "PUT", f"{hub.url}/lfs-upload/guessed", b"announced", Authorization="")[0] == 403

    def test_objects_belong_to_one_repository(self, hub: HubServer, api: HfApi) -> None:
        api.upload_file(repo_id=REPO, path_or_fileobj=b"w", path_in_repo="a.safetensors")
        hub.requests.clear()
        api.create_repo("org/copy")
        api.upload_file(repo_id="org/copy", path_or_fileobj=b"w", path_in_repo="a.safetensors")
        assert [request.where for request in hub.requests].count("lfs") == 1

    def test_stale_parent(self, hub: HubServer, api: HfApi) -> None:
        before = api.model_info(REPO).sha
        now = api.upload_file(repo_id=REPO, path_or_fileobj=b"1", path_in_repo="a.txt").oid
        operations = [CommitOperationAdd("a.txt", b"2")]
        with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
            api.create_commit(REPO, operations, commit_message="late", parent_commit=before)
        assert status(error) == 412
        assert hub.repos[REPO].head.oid == now
        api.create_commit(REPO, [CommitOperationAdd("a.txt", b"2")], commit_message="on time", parent_commit=now)
        assert hub.repos[REPO].files["a.txt"] == b"2"

    @pytest.mark.parametrize(
        "path",
        [
            "../a",
            "a/../b",
            "/a",
            "a//b",
            "./a",
            ".",
            "",
            ".git/config",
            "x/.GIT/hooks",
            "a\\b",
            "a\nb",
            "a/",
            None,
            "é" * 128,
        ],
    )
    def test_paths_that_lead_out(self, hub: HubServer, api: HfApi, path: Any) -> None:
        head = hub.repos[REPO].head
        assert (
            commit(hub, ("file", {"path": "fine", "content": ""}), ("file", {"path": path, "content": "x"}))[0] == 400
        )
        files = {"files": [{"path": path, "size": 1, "sample": ""}]}
        assert ask(hub, "POST", f"/api/models/{REPO}/preupload/main", files)[0] == 400
        assert hub.repos[REPO].head == head

    def test_a_file_is_no_folder(self, hub: HubServer, api: HfApi) -> None:
        assert commit(hub, ("file", {"path": "a", "content": ""}), ("file", {"path": "a/b", "content": ""}))[0] == 400

    def test_commits_that_are_none(self, hub: HubServer, api: HfApi) -> None:
        for body in (b"no json", b'{"key": "header"}', b"", b'{"key": "header", "value": {}}'):
            assert ask(hub, "POST", f"/api/models/{REPO}/commit/main", body)[0] == 400
        assert commit(hub, ("rename", {"path": "a"}))[0] == 400
        assert len(hub.repos[REPO].history) == 1


BAD_CARDS = {
    "list": "- a\n- b",
    "broken": "a: [",
    "twice": "license: mit\nlicense: mit",
    "unknown license": "license: beer",
    "empty license": "license:",
    "other without a name": "license: other",
    "one of two licenses": "license: [mit, beer]",
    "base_model no string": "base_model: 7",
    "base_model a folder": "base_model: ./runs/model",
    "one base_model no string": "base_model: [owner/a, {b: c}]",
    "relation": "base_model: owner/a\nbase_model_relation: cleaned",
    "dataset": "datasets: ['https://example.com/data']",
    "tags": "tags: word",
    "tag": "tags: [1]",
    "language": "language: English",
    "library": "library_name: [transformers]",
    "index": "model-index: model",
    "index without a name": "model-index: [{results: []}]",
    "index without results": "model-index: [{name: a}]",
    "result without a dataset": "model-index: [{name: a, results: [{task: {type: t}, metrics: []}]}]",
    "result without metrics": "model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d, name: d}}]}]",
    "metric without a value": (
        "model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d, name: d}, metrics: [{type: asr}]}]}]"
    ),
    "long": f"license_link: {'x' * 513}",
}  # fmt: skip
GOOD_CARDS = {
    "other": "license: other\nlicense_name: mine",
    "lists": "license: [mit]\nbase_model: [a/b, bert-base-uncased]\ndatasets: [a/b]\nlanguage: [en, zh-Hant]\ntags: [x]",
    "zero": (
        "model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d, name: d}, metrics: [{type: asr, value: 0}]}]}]"
    ),
    "free": "anything: [1, {else: 2}]",
    "long enough": f"license_link: {'x' * 512}",
}  # fmt: skip


class TestCards:
    @pytest.mark.parametrize("text", BAD_CARDS.values(), ids=BAD_CARDS.keys())
    def test_refused_before_and_at_the_commit(self, hub: HubServer, api: HfApi, text: str) -> None:
        card = f"---\n{text}\n---\n# Model\n"
        with pytest.raises(ValueError, match="Invalid metadata in README.md"):
            api.upload_file(repo_id=REPO, path_or_fileobj=card.encode(), path_in_repo="README.md")
        assert commit(hub, ("file", {"path": "README.md", "content": card}))[0] == 400
        assert ask(hub, "POST", "/api/validate-yaml", {"content": card}, Accept="text/plain")[0] == 400
        assert len(hub.repos[REPO].history) == 1

    @pytest.mark.parametrize("text", GOOD_CARDS.values(), ids=GOOD_CARDS.keys())
    def test_accepted(self, hub: HubServer, api: HfApi, text: str) -> None:
        api.upload_file(repo_id=REPO, path_or_fileobj=f"---\n{text}\n---\n".encode(), path_in_repo="README.md")
        assert len(hub.repos[REPO].history) == 2

    def test_every_license_is_a_word_of_its_own(self) -> None:
        assert all(not check_card(f"---\nlicense: {name}\nlicense_name: n\n---\n")[0] for name in LICENSES)
        assert {"apache-2.0", "mit", "cc-by-nc-4.0", "llama3.1", "other"} <= LICENSES

    def test_no_metadata_is_a_warning(self, hub: HubServer, api: HfApi) -> None:
        with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
            api.upload_file(repo_id=REPO, path_or_fileobj=b"# Model\n", path_in_repo="README.md")
        assert len(hub.repos[REPO].history) == 2

    def test_too_large(self, hub: HubServer, api: HfApi) -> None:
        card = CARD + "x" * (README_BYTES - len(CARD))
        assert commit(hub, ("file", {"path": "README.md", "content": card}))[0] == 200
        assert commit(hub, ("file", {"path": "README.md", "content": card + "x"}))[0] == 413
        with pytest.raises(HfHubHTTPError) as error:
            api.upload_file(repo_id=REPO, path_or_fileobj=f"{card}xx".encode(), path_in_repo="README.md")
        assert status(error) == 413
        assert hub.repos[REPO].files["README.md"] == card.encode()


class TestFaults:
    @pytest.mark.parametrize("where", ["validate", "preupload", "batch", "lfs", "verify", "commit"])
    def test_a_broken_connection_leaves_no_commit(self, hub: HubServer, api: HfApi, folder: Path, where: str) -> None:
        hub.break_at(where, times=None)
        with pytest.raises(Exception) as error:  # noqa: B017, PT011 - which one depends on the request
            api.upload_folder(repo_id=REPO, folder_path=folder)
        assert not isinstance(error.value, AssertionError)
        assert hub.requests[-1].where == where and hub.requests[-1].status is None
        assert len(hub.repos[REPO].history) == 1
        hub.heal()
        api.upload_folder(repo_id=REPO, folder_path=folder)
        assert hub.repos[REPO].files["model.safetensors"] == (folder / "model.safetensors").read_bytes()

    @pytest.mark.parametrize("where", ["preupload", "lfs", "commit"])
    def test_a_status_leaves_no_commit(self, hub: HubServer, api: HfApi, folder: Path, where: str) -> None:
        hub.fail_at(where, 503, times=None)
        with pytest.raises((HfHubHTTPError, RuntimeError)):
            api.upload_folder(repo_id=REPO, folder_path=folder)
        assert len(hub.repos[REPO].history) == 1

    @pytest.mark.parametrize("where", ["preupload", "lfs"])
    def test_the_client_tries_these_again(self, hub: HubServer, api: HfApi, folder: Path, where: str) -> None:
        hub.break_at(where)
        hub.fail_at(where, 503)
        api.upload_folder(repo_id=REPO, folder_path=folder)
        found = [request.status for request in hub.requests if request.where == where]
        # Two objects go up at once: which of them meets a fault, and which is done first, is not settled.
        assert found.count(None) == found.count(503) == 1 and set(found) == {None, 503, 200} and found[-1] == 200
        assert len(hub.repos[REPO].history) == 2

    def test_a_lost_answer_is_a_commit(self, hub: HubServer, api: HfApi, folder: Path) -> None:
        hub.break_at("commit", after=True)
        with pytest.raises(Exception, match="(?i)disconnected|reset|closed"):
            api.upload_folder(repo_id=REPO, folder_path=folder)
        assert len(hub.repos[REPO].history) == 2
        assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == hub.repos[REPO].head.oid
        assert len(hub.repos[REPO].history) == 2

    def test_a_broken_download_goes_on(
        self, hub: HubServer, api: HfApi, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
        api.upload_folder(repo_id=REPO, folder_path=folder)
        hub.break_at("resolve")
        found = Path(api.hf_hub_download(REPO, "model.safetensors")).read_bytes()
        assert found == (folder / "model.safetensors").read_bytes()
        assert [r.status for r in hub.requests if r.where == "resolve" and r.method == "GET"] == [None, 206]

    def test_another_place_is_refused(self, hub: HubServer) -> None:
        with pytest.raises(ValueError, match="must be one of"):
            hub.break_at("moon")


SCRIPT = """
import sys
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

torch.manual_seed(0)
sizes = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
model = BertForSequenceClassification(BertConfig(**sizes)).eval()
model.push_to_hub("owner/tiny", private=True)
loaded = AutoModelForSequenceClassification.from_pretrained("owner/tiny").eval()
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))

adapted = get_peft_model(loaded, LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False)).eval()
adapted.push_to_hub("owner/adapter")
again = AutoPeftModelForSequenceClassification.from_pretrained("owner/adapter").eval()
ids = torch.tensor([[1, 2, 3]])
torch.testing.assert_close(adapted(ids).logits, again(ids).logits)
print("all came back")
"""


def test_transformers_and_peft_in_another_process(hub: HubServer, tmp_path: Path) -> None:
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")},
        "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "all came back" in done.stdout, done.stderr
    assert hub.repos["owner/tiny"].private
    assert "adapter_model.safetensors" in hub.repos["owner/adapter"].files
    assert not [path for repo in hub.repos.values() for path in repo.files if path.endswith((".bin", ".pt", ".pkl"))]


def test_a_server_of_its_own_process(tmp_path: Path) -> None:
    place = tmp_path / "port"
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.hub_server", "--port-file", str(place)],
        env={**os.environ, "HF_TOKEN": "hf_given"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        # The file follows the line; who waits for the file alone finds it whole.
        while not place.exists():
            assert server.poll() is None
        assert url.endswith(f":{int(place.read_text())}")
        request = urllib.request.Request(f"{url}/api/whoami-v2", headers={"Authorization": "Bearer hf_given"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            assert json.load(answer)["name"] == "owner"
    finally:
        server.terminate()
        server.wait(10)
        server.stdout.close()
