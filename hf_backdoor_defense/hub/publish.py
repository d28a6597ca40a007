"""Publishing a model of a run with its evidence: one commit, or none.

| step | asks the Hub | may refuse because of |
|---|---|---|
| `stage` | nothing (or the base's license) | results, seal, INERT and gates, attacked weights, files, license, card |
| who and where | reads | token, rights, visibility, another type of repository, others' files |
| repository, branch | makes them where they are missing | rights |
| commit | writes once, on the head that was seen | somebody else's commit in between |

Which repositories are written to: see `repository.py`. Who may see one is decided when it is made, and not changed by a push.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

from hf_backdoor_defense.hub.faults import explained
from hf_backdoor_defense.hub.repository import (
    NOTHING,
    Place,
    check_token,
    check_visibility,
    fetch,
    holds,
    look,
    make,
    make_branch,
    outdated_files,
)
from hf_backdoor_defense.hub.staging import Staged, stage
from hf_backdoor_defense.reporting.sealed import CHECKSUMS

UNKNOWN = "whether the commit arrived is not known; the next push tells, and changes nothing if it did"


@dataclass(frozen=True, kw_only=True)
class Published:
    """What `publish` did.

    Args:
        url: of the repository, at the branch. commit: its head now; None after a dry run.
        files: bytes by path. left_out: what of the model's folder was not published, and why.
        card: the README's text. changed: a commit was made. forced: in spite of failures. attacked: the weights were.
        deleted: files of an earlier publication that went. notes: what a dry run could not decide.
    """

    repo_id: str
    url: str
    commit: str | None
    files: dict[str, int]
    card: str
    changed: bool
    left_out: dict[str, str] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    forced: bool = False
    attacked: bool = False


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    arm: str | None = None,
    seed: int | None = None,
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] | None = None,
    language: Sequence[str] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    attacked: bool = False,
    commit_message: str | None = None,
    api: HfApi | None = None,
) -> Published:
    """Publish one model of the finished run in `folder` with its card, results, report, plots and checksums.

    Everything is checked before the Hub is asked to change anything; nothing local is changed. Publishing the same again makes no
    commit.

    Args:
        repo_id: "ORG/NAME"; made where it is missing. arm, seed: which model, where the run left several.
        license: None inherits the base's. base_model: its Hub id, where the run names a folder. datasets: Hub ids.
        private: of a repository that is made here; None: as the account's default. One that exists must be so already.
        revision: a branch, made where it is missing. token: None takes HF_TOKEN or the login.
        dry_run: ask the Hub nothing and publish nothing. commit_message: None says which model.
        force: publish in spite of INERT or a failed gate; the card then says so first.
        attacked: publish weights that were attacked on purpose, into a private repository; the card says so first.
        api: a client for another endpoint.

    Raises:
        ValueError: the run, the model or the options do not allow it, or the Hub refused.
        ConnectionError: the Hub was not reached, or failed.

    Example:
        >>> publish("runs/none", "owner/model", license="mit", dry_run=True)
        Traceback (most recent call last):
        ...
        ValueError: `runs/none` must be the folder of a finished run, but does not exist: a card is made from its \
results. Finish the run with the command that started it, or name its --output_dir.
    """
    _check_options(private=private, revision=revision, attacked=attacked)
    api = api or HfApi(token=token)
    if not dry_run:
        _check_online()
    staged = stage(
        folder,
        repo_id,
        arm=arm,
        seed=seed,
        license=license,
        base_model=base_model,
        datasets=datasets,
        language=language,
        force=force,
        attacked=attacked,
        dry_run=dry_run,
        api=api,
    )
    done: dict[str, Any] = {
        "repo_id": repo_id,
        "files": staged.sizes,
        "card": str(staged.card),
        "left_out": staged.left_out,
        "notes": staged.notes,
        "forced": staged.publication.forced,
        "attacked": staged.attacked,
    }
    url = f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")
    if dry_run:
        return Published(url=url, commit=None, changed=False, **done)
    token = check_token(api, token, repo_id)
    place = look(api, repo_id, revision, token)
    if place is None:
        place = make(api, repo_id, private=True if staged.attacked else private, revision=revision, token=token)
    check_visibility(place, private=private, attacked=staged.attacked)
    outdated = outdated_files(api, place, staged.files, token)
    if not place.branch:
        place = make_branch(api, place, str(revision), token)
    changed = bool(outdated) or not holds(api, place, staged.files, staged.checksums, token)
    head = place.head
    if changed:
        head = _commit(api, staged, place, outdated, revision=revision, token=token, message=commit_message)
    return Published(url=url, commit=head, changed=changed, deleted=outdated, **done)


def _check_options(*, private: bool | None, revision: str | None, attacked: bool) -> None:
    if attacked and private is False:
        raise ValueError(
            "Attacked weights must stay private, got private=False with attacked=True. Leave one of them out."
        )
    if revision is not None and (
        revision.startswith("refs/")
        or re.fullmatch("[0-9a-f]{40}", revision)
        or not re.fullmatch(r"[\w./-]+", revision)
    ):
        raise ValueError(
            f"`revision` must be the name of a branch, got {revision!r}: a commit is made on top of one. For example `v1`."
        )


def _check_online() -> None:
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"HF_HUB_OFFLINE must not be set to publish: it forbids every request, so {NOTHING}. Unset it, or look at "
            "what would be published with --dry_run (dry_run=True)."
        )


def _commit(
    api: HfApi,
    staged: Staged,
    place: Place,
    outdated: Sequence[str],
    *,
    revision: str | None,
    token: str,
    message: str | None,
) -> str:
    """Commit on the head that was seen; the head afterwards."""
    repo_id, entry = place.repo_id, staged.evidence.entry
    operations: list[Any] = []
    for name, content in staged.files.items():
        add = CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        if name in staged.checksums:  # known already: the weights are not read once more to hash them
            add.upload_info.sha256 = bytes.fromhex(staged.checksums[name]["sha256"])
        operations.append(add)
    operations += [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in outdated]
    what = message or f"{entry.arm}, seed {entry.seed}: model, card and evidence"
    try:
        with explained(repo_id, place.state):
            done = api.create_commit(
                repo_id, operations, commit_message=what, revision=revision, parent_commit=place.head, token=token
            )
    except ConnectionError:
        # The answer may have been lost, and not the commit: what the branch holds now says which.
        with explained(repo_id, UNKNOWN):
            head = str(api.model_info(repo_id, revision=revision, token=token).sha)
            arrived = head != place.head and fetch(api, repo_id, CHECKSUMS, head, token) == staged.files[CHECKSUMS]
        if arrived:
            return head
        raise
    return str(done.oid)
