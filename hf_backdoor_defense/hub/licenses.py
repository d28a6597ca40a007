"""Which licenses the Hub knows, and which one a model inherits from its base.

    base's README.md  ->  inherited_license  ->  check_license  ->  the card's `license`

A fine-tuned, purified or attacked model is a derived work: its license is its base's unless somebody who may decide says
otherwise. Nothing is guessed. Where the base names none, publishing asks for one.
"""

import difflib
from typing import Any

from hf_backdoor_defense.hub.bases import card_metadata

PLACE = "https://huggingface.co/docs/hub/repositories-licenses"

# The identifiers that the Hub documents, in its order.
LICENSES = tuple(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
    artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0
    cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
    ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense
    zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other""".split()
)


def check_license(license_id: Any) -> str:
    """The id, if the Hub knows it.

    Raises:
        ValueError: another, with the nearest one that is known.

    Example:
        >>> check_license("apache-2.0")
        'apache-2.0'
        >>> check_license("Apache 2")
        Traceback (most recent call last):
        ...
        ValueError: `license` must be an identifier that the Hub knows, got 'Apache 2': it refuses cards with another. Did you \
mean `apache-2.0`? They are listed at https://huggingface.co/docs/hub/repositories-licenses; `other` is for a text of your own.
    """
    if isinstance(license_id, str) and license_id in LICENSES:
        return license_id
    near = difflib.get_close_matches(str(license_id).lower().replace(" ", "-"), LICENSES, n=1)
    hint = f"Did you mean `{near[0]}`? " if near else ""
    raise ValueError(
        f"`license` must be an identifier that the Hub knows, got {license_id!r}: it refuses cards with another. {hint}They are "
        f"listed at {PLACE}; `other` is for a text of your own."
    )


def inherited_license(base: str, *, api: Any = None) -> str | None:
    """The license that the base's card names, or None where it names none, several, or one the Hub does not know.

    Args:
        base: as a run names it: Hub id, folder, offline:…; empty for none.
        api: an `HfApi`, where the base is on the Hub and another server or token is meant than the environment's.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (pathlib.Path(folder) / "README.md").write_text("---\\nlicense: mit\\n---\\n# A base\\n")
        ...     inherited_license(folder)
        'mit'
        >>> inherited_license("") is None
        True
    """
    found = card_metadata(base, api=api).get("license")
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    return found if isinstance(found, str) and found in LICENSES else None
