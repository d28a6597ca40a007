"""Where an artefact of ours lies: in a folder, or on the Hub, from where the files that are asked for are downloaded.

    "owner/name", revision, names  ->  a folder with those of `names` that the repository has

Names are named one by one, so that nothing else of a repository, and no format that can run code, ever reaches this machine.
"""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_repository(source: str | Path) -> bool:
    """Whether `source` is meant as ORG/NAME on the Hub: a string of that form where no folder lies.

    >>> is_repository("owner/name"), is_repository("./name"), is_repository(Path("owner/name"))
    (True, False, False)
    """
    return isinstance(source, str) and _HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def fetched(
    source: str | Path, names: Sequence[str], *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The folder with the files `names` of `source`; whether they are there is for the caller to see.

    Args:
        source: a folder, or ORG/NAME on the Hub. revision: branch, tag or commit there.
        token: None: the one of HF_TOKEN or of the login.

    Raises:
        ValueError: no such repository or revision, no rights, no network; a revision of a folder.

    >>> fetched("runs/of/mine", ["filter.json"], revision="main")
    Traceback (most recent call last):
    ...
    ValueError: `revision` must be left out for the folder `runs/of/mine`, got 'main': only a repository has revisions.
    """
    if not is_repository(source):
        if revision is not None:
            raise ValueError(
                f"`revision` must be left out for the folder `{source}`, got {revision!r}: only a repository has revisions."
            )
        return Path(source)
    patterns = [glob.escape(name) for name in names]
    try:
        return Path(snapshot_download(str(source), revision=revision, token=token, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        where = f"at revision {revision!r} " if revision is not None else ""
        raise ValueError(
            f"`{source}` must be a folder or a repository that can be read {where}on the Hub, and is neither "
            f"({str(error).splitlines()[0]}). Check the name, the network, and HF_TOKEN where it is private."
        ) from error
