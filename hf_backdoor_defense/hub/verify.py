"""Verification of a published model: is what it says of itself so?

| check | passes when | who could still deceive |
|---|---|---|
| files | names and contents are on the list; judged before anything is downloaded | - |
| checksums | every file is as `checksums.json` says, and none is beyond it | who writes them anew |
| report | no gate failed, nothing was INERT, nobody forced it, nobody attacked the weights on purpose | who edits the results |
| card | the card, made again from the results, is the one there | who edits the results and makes it again |
| weights | they load, and are those the results are about | who edits the results |
| figures | measured again, they agree (`agreement.py`) | nobody, on the rows that were measured on |

Only the last check is more than consistency. It names the trigger that was measured with: of others nothing is known. Exit code
0: all pass; 1: one failed; 2: none failed, and one could not be done, such as a card that another version of this package worded.
"""

import glob
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from hf_backdoor_defense.fetching import is_repository
from hf_backdoor_defense.hub.agreement import Agreement, check_interval
from hf_backdoor_defense.hub.card import CARD_LIMIT, EVAL_FOLDER, eval_files, eval_results, render_card
from hf_backdoor_defense.hub.evidence import Evidence, Publication, read_evidence
from hf_backdoor_defense.hub.faults import explained
from hf_backdoor_defense.hub.files import CARD, REPORT, check_folder, refused_names
from hf_backdoor_defense.hub.reproduce import Unverifiable, check_weights, measured_again, measured_trigger
from hf_backdoor_defense.models import BACKDOOR_FILE
from hf_backdoor_defense.reporting.html import cut, visible
from hf_backdoor_defense.reporting.results import environment
from hf_backdoor_defense.reporting.sealed import CHECKSUMS, RESULTS, file_sha256, read_checksums

PASS, FAIL, SKIPPED, UNKNOWN = "pass", "fail", "skipped", "unknown"
CHECKS = ("files", "checksums", "report", "card", "weights", "figures")
MAX_GB = 20.0
LARGEST_TEXT = 2**27  # bytes of a file that is no weights: tokenizers of large vocabularies have 40 MB
_OF_THE_HUB = ".gitattributes"
NOTHING = "nothing was downloaded"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check: `outcome` is pass, fail, skipped, or unknown where it could not be done. `text` says why."""

    name: str
    outcome: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was checked of a published model, and what came out. `commit`: of the repository that was read, None for a folder.
    `trigger`: what the figures were measured with again, in words, None where there was none."""

    source: str
    commit: str | None
    checks: list[Check]
    figures: list[Agreement] = field(default_factory=list)
    trigger: str | None = None

    @property
    def exit_code(self) -> int:
        """0: everything that was to be checked passes. 1: something failed. 2: something could not be checked."""
        outcomes = {check.outcome for check in self.checks}
        return 1 if FAIL in outcomes else 2 if UNKNOWN in outcomes else 0

    @property
    def sentence(self) -> str:
        """What may be concluded, and no more."""
        by_name = {check.name: check for check in self.checks}
        failed = [check.name for check in self.checks if check.outcome == FAIL]
        if failed == ["report"]:  # it says so itself
            return f"Not to be let through: {by_name['report'].text}."
        if failed:
            return f"Not what it says it is: {', '.join(failed)} failed. Do not rely on its figures."
        passed = [name for name in ("files", "card", "weights") if by_name[name].outcome == PASS]
        if len(passed) < 2:
            return "Nothing was verified."
        together = f"{', '.join(passed[:-1]).capitalize()} and {passed[-1]} belong together"
        if by_name["card"].outcome == UNKNOWN:
            together += "; the card's words could not be checked"
        if by_name["figures"].outcome == PASS:
            shown = ", ".join(figure.metric for figure in self.figures)
            using = "" if self.trigger is None else f", with the trigger {self.trigger}"
            other = "triggers that nobody simulated" if self.trigger is None else "any other trigger"
            return (
                f"{together}, and {shown} hold on the rows they were measured on now{using}. That says nothing about {other}, "
                "nor about figures that were not measured again."
            )
        return (
            f"{together}. The figures are the publisher's claim: they were not measured again, and whoever edits results, card "
            "and checksums alike passes these checks."
        )

    def text(self) -> str:
        """For people; what strangers wrote is printed with its control characters written out."""
        at = " (a folder here)" if self.commit is None else f" at {self.commit[:12]}"
        lines = [f"{self.source}{at}", *(f"{c.name:10} {c.outcome:8} {' '.join(c.text.split())}" for c in self.checks)]
        lines += [f"{'':10} {'':8} {figure.text()}" for figure in self.figures]
        return visible("\n".join([*lines, "", self.sentence]))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "schema": 1, "source": self.source, "commit": self.commit, "exit_code": self.exit_code,
            "checks": [asdict(check) for check in self.checks], "figures": [figure.to_dict() for figure in self.figures],
            "trigger": self.trigger, "sentence": self.sentence,
        }  # fmt: skip


def verify(
    source: str | Path,
    *,
    revision: str | None = None,
    task: str | None = None,
    clean: str | None = None,
    all_rows: bool = False,
    files_only: bool = False,
    allow_forced: bool = False,
    options: dict[str, Any] | None = None,
    max_gb: float = MAX_GB,
    keep: str | Path | None = None,
    progress: bool = False,
    token: str | bool | None = None,
    api: HfApi | None = None,
) -> Verification:
    """Check a published model: files, checksums, report, card, weights, figures. No code of it is run.

    Args:
        source: ORG/NAME on the Hub, or a folder with the same content.
        revision: branch, tag or commit. task: rows to measure on, as for `hfbd train`; None: the record's own, if anybody can
            read them. clean: clean texts (.jsonl, .csv), to measure a filter's rate on.
        all_rows: measure on every row of `task`. False: where they hold the rows of the record, on those; else on its test split.
        files_only: load and measure nothing; the figures are then the publisher's claim.
        allow_forced: let a model pass that was published in spite of a failed report. One attacked on purpose never passes.
        options: of `remeasure`, over the record's: text_column, image_column, label_column, split, limit, max_length.
        max_gb: download nothing of a repository that is larger, and no base. A data set that only the record names: 1 GB.
        keep: a new folder to download to, so that what was verified can be loaded; removed where its files do not pass. None:
            removed afterwards.
        token: None: the one of HF_TOKEN or of the login. api: a client for another endpoint.

    Raises:
        ValueError: no such repository or folder, no rights, `keep` is not empty. ConnectionError: the Hub was not reached.

    Example:
        >>> verify("no/such/folder")
        Traceback (most recent call last):
        ...
        ValueError: `no/such/folder` must be a published folder or ORG/NAME on the Hub, and is neither. Check the name.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if is_repository(source):
            place = Path(scratch) / "model" if keep is None else _new_folder(keep)
            folder, commit, names, refusal = _download(
                api or HfApi(token=token), str(source), revision, place, max_gb=max_gb, token=token
            )
        elif Path(source).is_dir():
            if revision is not None or keep is not None:
                raise ValueError(f"`{source}` is a folder: `revision` and `keep` are for a repository. Leave them out.")
            folder, commit, names, refusal = Path(source), None, None, None
        else:
            raise ValueError(
                f"`{source}` must be a published folder or ORG/NAME on the Hub, and is neither. Check the name."
            )
        if refusal is not None:
            rest = [Check(name=n, outcome=SKIPPED, text=NOTHING) for n in CHECKS[1:]]
            return Verification(source=str(source), commit=commit, checks=[refusal, *rest])
        checks, figures, trigger = _checks(
            folder, names, task=task, clean=clean, all_rows=all_rows, files_only=files_only, allow_forced=allow_forced,
            options=options or {}, max_gb=max_gb, progress=progress,
        )  # fmt: skip
        if keep is not None and checks[0].outcome != PASS:
            shutil.rmtree(folder)
            removed = f"{checks[0].text}; the download was removed"
            checks[0] = replace(checks[0], text=removed)
    return Verification(source=str(source), commit=commit, checks=checks, figures=figures, trigger=trigger)


def _new_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`{folder}` must be new or empty: nothing there will be touched. Choose another.")
    return folder


def _download(
    api: HfApi, source: str, revision: str | None, place: Path, *, max_gb: float, token: str | bool | None
) -> tuple[Path, str, list[str], Check | None]:
    """Folder, commit, names, and why nothing was downloaded, or None: names and sizes are judged first."""
    try:
        with explained(source, NOTHING):
            info = api.model_info(source, revision=revision, files_metadata=True, token=token)
    except ValueError as error:
        if not isinstance(error.__cause__, (RepositoryNotFoundError, RevisionNotFoundError)):
            raise
        at = "" if revision is None else f" with the revision {revision!r}"
        raise ValueError(
            f"`{source}` must be a model{at} on the Hub that may be seen with this token, and there is none: {NOTHING}. Check "
            "the name, and HF_TOKEN where it is private."
        ) from error.__cause__
    commit, sizes = str(info.sha), {file.rfilename: file.size for file in info.siblings or []}
    names = sorted(sizes)
    refused = refused_names(names)
    refused |= {
        name: "its size is not known" if size is None else "too large for what it is"
        for name, size in sizes.items()
        if name not in refused and (size is None or (size > LARGEST_TEXT and not name.endswith(".safetensors")))
    }
    if refused:
        return place, commit, names, Check(name="files", outcome=FAIL, text=f"{_listed(refused)}; {NOTHING}")
    total = sum(size or 0 for size in sizes.values())
    if total > max_gb * 1e9:
        text = f"{total / 1e9:.1f} GB, more than the {max_gb:g} GB allowed (--max_gb); {NOTHING}"
        return place, commit, names, Check(name="files", outcome=UNKNOWN, text=text)
    with explained(source, NOTHING):
        snapshot_download(
            source,
            revision=commit,
            local_dir=place,
            allow_patterns=[glob.escape(name) for name in names],  # and whatever else a server may offer by now: no
            token=api.token if token is None else token,
            endpoint=api.endpoint,
        )
    shutil.rmtree(place / ".cache", ignore_errors=True)
    return place, commit, names, None


def _checks(
    folder: Path, names: list[str] | None, *, files_only: bool, allow_forced: bool, **measuring: Any
) -> tuple[list[Check], list[Agreement], str | None]:
    done: dict[str, Check] = {}
    figures: list[Agreement] = []

    def run(name: str, look: Callable[[], str]) -> bool:
        try:
            outcome, text = PASS, look()
        except Unverifiable as error:
            outcome, text = UNKNOWN, str(error)
        except (
            Exception
        ) as error:  # what a stranger's files hold can be wrong in every way, and each has its own exception
            outcome, text = FAIL, str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        done[name] = Check(name=name, outcome=outcome, text=cut(text, 1000))
        return outcome == PASS

    read: list[tuple[Evidence, Publication]] = []
    trigger: list[str] = []

    def report() -> str:
        publication = Publication.read(folder)
        read.append((read_evidence(folder, arm=publication.arm, seed=publication.seed), publication))
        return _report(folder, *read[0], allow_forced=allow_forced)

    def figures_hold() -> str:
        found, where = measured_again(folder, *read[0], **measuring)
        figures.extend(found)
        if any(figure.metric not in ("ca", "frr") for figure in found):
            trigger.extend(filter(None, [measured_trigger(read[0][0])]))
            where += f", with the trigger {trigger[0]}"
        if wrong := [figure.metric for figure in found if not figure.holds]:
            raise ValueError(f"{', '.join(wrong)} do not hold {where}")
        return f"{', '.join(figure.metric for figure in found)} hold {where}"

    if run("files", lambda: _files(folder)):
        run("checksums", lambda: _checksums(folder, names))
        run("report", report)
        if read:
            run("card", lambda: _card(folder, *read[0]))
            if not files_only and run("weights", lambda: check_weights(folder, *read[0], max_gb=measuring["max_gb"])):
                run("figures", figures_hold)
    why = "not asked for (files only)" if files_only else "an earlier check did not pass"
    checks = [done.get(name, Check(name=name, outcome=SKIPPED, text=why)) for name in CHECKS]
    return checks, figures, trigger[0] if trigger else None


def _files(folder: Path) -> str:
    names = check_folder(folder)
    if REPORT in names:
        source = files("hf_backdoor_defense.reporting").joinpath("templates/base.html.j2").read_text(encoding="utf-8")
        head = source[: source.index(">", source.index("Content-Security-Policy")) + 1]
        text = (folder / REPORT).read_bytes().decode()
        # A browser that has read this policy runs no script and loads nothing; what could still lead away is a refresh.
        if not text.startswith(head) or len(re.findall(r"<meta[^>]*http-equiv", text, re.IGNORECASE)) != 1:
            raise _unlike(
                _version(folder),
                f"{REPORT} does not begin as ours do, with a policy by which it runs nothing: do not open it",
            )
    return f"{len(names)} files, safetensors and known text only"


def _checksums(folder: Path, names: list[str] | None) -> str:
    there = set(check_folder(folder) if names is None else names) - {CHECKSUMS, _OF_THE_HUB}
    sealed = read_checksums(folder)
    wrong = {name: "not in it" for name in there - set(sealed)} | {name: "missing" for name in set(sealed) - there}
    wrong |= {name: "changed" for name in there & set(sealed) if file_sha256(folder / name) != sealed[name]["sha256"]}
    if wrong:
        raise ValueError(f"not what {CHECKSUMS} says: {_listed(wrong)}")
    return f"{len(sealed)} files are as {CHECKSUMS} says, and there is no other"


def _report(folder: Path, evidence: Evidence, publication: Publication, *, allow_forced: bool) -> str:
    if evidence.entry.attacked is not None or evidence.entry.role == "attacked" or (folder / BACKDOOR_FILE).exists():
        raise ValueError(
            "these weights were attacked on purpose: whoever loads them gets the backdoor. Such a model "
            "never passes: exit code 1 is as it should be"
        )
    reasons = list(evidence.failures)
    if evidence.entry.inert:
        reasons.append(f"INERT: {evidence.entry.inert}")
    if publication.forced and not reasons:
        reasons = ["it was forced"]
    if reasons and not allow_forced:
        raise ValueError(f"published in spite of its report: {'; '.join(dict.fromkeys(map(str, reasons)))}")
    if reasons:
        return f"allowed by --allow_forced, in spite of: {'; '.join(dict.fromkeys(map(str, reasons)))}"
    return "no gate failed, and nothing says that the method did nothing"


def _card(folder: Path, evidence: Evidence, publication: Publication) -> str:
    size, version = (folder / CARD).stat().st_size, _version(folder)
    if size > CARD_LIMIT:
        raise ValueError(f"{CARD} has {size} bytes, and no card of ours has more than {CARD_LIMIT}: it was not read")
    for record in evidence.records:
        check_interval(record)
    there, card = (folder / CARD).read_bytes().decode(), str(render_card(evidence, publication))
    wanted = eval_results(evidence, publication)
    if there != card:
        metadata: Any = ModelCard(there).data
        found = metadata.eval_results or []
        if _values(found) != _values(wanted) or (found != wanted and version is None):
            raise ValueError(f"model-index in {CARD} has other figures than {RESULTS}")
        pairs = zip([*there.splitlines(), ""], [*card.splitlines(), ""], strict=False)
        at = next((i for i, (one, other) in enumerate(pairs, 1) if one != other), 0)
        raise _unlike(version, f"{CARD} is not the card of its results (line {at})")
    wanted_files = eval_files(evidence, publication)
    names = {p.relative_to(folder).as_posix() for p in (folder / EVAL_FOLDER).glob("*")}
    if names != set(wanted_files) or any((folder / name).read_bytes() != made for name, made in wanted_files.items()):
        raise _unlike(version, f"the files in {EVAL_FOLDER} are not those of its results")
    return f"made again from the results it is the same, its model-index ({len(wanted)}) too"


def _values(results: Any) -> list[tuple[str, str]]:
    return sorted((str(result.metric_type), repr(result.metric_value)) for result in results)


def _version(folder: Path) -> str | None:
    """The version of this package that the results name, where it is another than this one; else None."""
    try:
        named = json.loads((folder / RESULTS).read_bytes())["records"][0]["env"]["hf_backdoor_defense"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return named if isinstance(named, str) and named != environment()["hf_backdoor_defense"] else None


def _unlike(version: str | None, what: str) -> ValueError:
    """What differs: a failure, or for results of another version, which may word it otherwise, nothing that can be told."""
    if version is None:
        return ValueError(what)
    here = environment()["hf_backdoor_defense"]
    return Unverifiable(
        f"{what}; it was made by version {version[:40]!r} of this package, this is {here}, and they may word it otherwise: "
        "verify it with that version"
    )


def _listed(named: dict[str, str]) -> str:
    items = [f"{name!r} ({reason})" for name, reason in sorted(named.items())]
    return ", ".join(items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")
