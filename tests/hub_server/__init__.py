"""A Hub on loopback for tests and the demo: the real huggingface_hub, transformers and peft talk to it over HTTP.

    with HubServer() as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        …                                   # hub.repos["owner/name"].files, .history, .private; hub.requests
    hub.break_at("preupload" | "lfs" | "commit" | …, times=1, after=False); hub.fail_at(where, status); hub.add_user("other")

Where no `api` is passed on (`ModelCard.load`, `from_pretrained`, …) call `client.use(hub, monkeypatch, cache=…)`, which returns
one, too; or start a process with `HF_ENDPOINT=hub.url`, `HF_TOKEN`, `HF_HUB_DISABLE_XET=1` and without `HF_HUB_OFFLINE`, as users
do. `python -m tests.hub_server --port-file FILE` serves in a process of its own.

Read from the client (huggingface_hub 2.4), and so exact: paths and bodies, headers (X-Error-Code, X-Error-Message, X-Repo-Commit,
ETag, X-Linked-*), how statuses become exceptions, uploadMode, shouldIgnore and oid of a preupload, the LFS batch, paging by Link.
Known of the Hub: files from 10 MB are LFS, a new repository begins with a commit of .gitattributes, a stale parent is 412.

Assumed about the Hub:
- README.md up to 1 MiB; the rules of `metadata`; a string of a field up to 512 characters.
- A private repository of others, and a missing one: 401 for nobody, 404 for anybody else, both RepoNotFound.
- LFS objects belong to one repository; wrong content is refused where it is uploaded (400), and a commit that points to an object
  that is not there is refused (400). Binary files are LFS whatever their name.
- A commit that changes nothing keeps the head. Nothing is committed to a tag or a commit's name.
- No dates: the n-th commit is n seconds after the epoch of `storage`; commit names depend on the content and its order alone.

Not covered: Xet (a client with Xet on needs HF_HUB_DISABLE_XET=1, or `lfs=False`, by which every file comes in the commit), rate
limits, pull requests and discussions, gated repositories, resource groups, Spaces that run, multipart and resumed uploads,
redirects to a CDN, copies and renames, squashed histories, webhooks, malware scans, checks of `.eval_results`, git itself.
"""

from tests.hub_server.server import HubServer

__all__ = ["HubServer"]
