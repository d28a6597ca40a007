"""What the Hub answers to each request; `ROUTES` maps method and path to a function of `Call`.

| name (`where` of a fault) | requests |
|---|---|
| whoami, create, delete, settings | who, POST and DELETE /api/repos, PUT …/settings |
| info, tree, paths, commits, refs | GET …/revision/R, …/tree/R/PATH, POST …/paths-info/R, GET …/commits/R, …/refs |
| branch, tag | POST, DELETE …/branch/B, …/tag/T |
| validate, preupload, batch, lfs, verify, commit | an upload, in its order |
| resolve | HEAD, GET …/resolve/R/PATH |
"""

import re
from collections.abc import Callable

from tests.hub_server import contents, repositories, uploads
from tests.hub_server.calls import Answer, Call

Function = Callable[[Call], Answer]

_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
_WEB = r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+?)"
ROUTES: list[tuple[str, re.Pattern[str], Function]] = [
    (methods, re.compile(pattern), function)
    for methods, pattern, function in (
        ("GET", r"/api/whoami-v2", repositories.whoami),
        ("POST", r"/api/repos/create", repositories.create),
        ("DELETE", r"/api/repos/delete", repositories.delete),
        ("POST", r"/api/validate-yaml", uploads.validate),
        ("PUT", r"/lfs-upload/(?P<grant>\w+)", uploads.lfs),
        ("GET", _API, contents.info),
        ("GET", _API + r"/revision/(?P<revision>[^/]+)", contents.info),
        ("GET", _API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", contents.tree),
        ("POST", _API + r"/paths-info/(?P<revision>[^/]+)", contents.paths),
        ("GET", _API + r"/commits/(?P<revision>[^/]+)", contents.commits),
        ("GET", _API + r"/refs", repositories.refs),
        ("POST DELETE", _API + r"/branch/(?P<name>[^/]+)", repositories.branch),
        ("POST DELETE", _API + r"/tag/(?P<name>[^/]+)", repositories.tag),
        ("PUT", _API + r"/settings", repositories.settings),
        ("POST", _API + r"/preupload/(?P<revision>[^/]+)", uploads.preupload),
        ("POST", _API + r"/commit/(?P<revision>[^/]+)", uploads.commit),
        ("POST", _WEB + r"\.git/info/lfs/objects/batch", uploads.batch),
        ("POST", _WEB + r"\.git/info/lfs/objects/verify", uploads.verify),
        ("GET HEAD", _WEB + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", contents.resolve),
    )
]


def route(method: str, path: str) -> tuple[Function, dict[str, str]] | None:
    """The function for a request and the named parts of its path."""
    for methods, pattern, function in ROUTES:
        found = pattern.fullmatch(path)
        if found and method in methods.split():
            return function, {key: value for key, value in found.groupdict().items() if value is not None}
    return None
