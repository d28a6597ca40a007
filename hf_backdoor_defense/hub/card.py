"""The card of a published model: README.md, a function of what its run measured and of how it is published.

    results.json (Evidence) + publication.json (Publication)  ->  render_card  ->  README.md
                                                              ->  eval_files   ->  .eval_results/*.yaml

No date, no folder, no network: the same two give the same bytes, and whoever holds them can render the card again and compare.
What a run says (labels, triggers, names) is shown and never obeyed, see `markdown.py`. The figures of the metadata are those of
results.json, unrounded: `ModelCard.load(card).data.eval_results == eval_results(evidence, publication)`.
"""

import difflib
import functools
import math
import re
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from hf_backdoor_defense.hub.bases import is_hub_id
from hf_backdoor_defense.hub.card_text import context, method_name, together
from hf_backdoor_defense.hub.evidence import Evidence, Publication
from hf_backdoor_defense.hub.figures import NO_SCORES, eval_results, type_of
from hf_backdoor_defense.hub.licenses import check_license
from hf_backdoor_defense.hub.usage import AUTO_CLASSES

__all__ = ["CARD", "CARD_LIMIT", "EVAL_FOLDER", "eval_files", "eval_results", "render_card"]

CARD, EVAL_FOLDER = "README.md", ".eval_results"
CARD_LIMIT = 2**20  # bytes; ours: the Hub documents none, and a card that long is a mistake
_NO_SCORES = {type_of(metric) for metric in NO_SCORES}
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{1,8})*|code|multilingual")


def render_card(evidence: Evidence, publication: Publication) -> ModelCard:
    """The card, complete: metadata and text.

    Raises:
        ValueError: a name, license, base, data set, language or task that the Hub does not take; a number that is none; too long.

    Example:
        >>> from hf_backdoor_defense.reporting.entries import ModelEntry
        >>> entry = ModelEntry(path="model", arm="d3", seed=0, role="purified", pipeline_tag="text-classification",
        ...                    base_model="owner/model", weights_sha256="0" * 64, method={"name": "d3"})
        >>> about = Publication(repo_id="me/clean-model", arm="d3", seed=0, license="mit", base_model="owner/model")
        >>> card = render_card(Evidence(payload={}, entry=entry, records=[]), about)
        >>> card.data.license, card.data.tags, card.text.splitlines()[1]
        ('mit', ['backdoor-defense', 'd3', 'generated_from_trainer'], '# clean-model')
    """
    _check(evidence, publication)
    text = _template().render(context(evidence, publication))
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    content = f"---\n{_metadata(evidence, publication).to_yaml()}\n---\n\n{text}\n"
    size = len(content.encode())
    if size > CARD_LIMIT:
        raise ValueError(
            f"the card must be at most {CARD_LIMIT} bytes, got {size}: nobody reads more, and the Hub may refuse it. "
            "Shorten what the run says of its data, its activity or its failures, most likely one very long value."
        )
    return ModelCard(content)


def eval_files(evidence: Evidence, publication: Publication) -> dict[str, bytes]:
    """Files for the Hub's evaluation results, by path: one per data set that is on the Hub, none for others.

    The task of a result is its metric: a benchmark's own tasks are measured by its own rules, and these are not. What no data set
    scores (the dose, say) stays out.

    Example: see tests/hub/test_card.py.
    """
    _check(evidence, publication)
    found: dict[str, list[EvalResultEntry]] = {}
    on_hub = {record.dataset for record in evidence.figures.values()} & set(publication.datasets)
    for result in eval_results(evidence, publication):
        if result.dataset_type in on_hub and result.metric_type not in _NO_SCORES:
            about = ", ".join(f"{key} {value}" for key, value in (result.metric_args or {}).items())
            found.setdefault(result.dataset_type, []).append(
                EvalResultEntry(
                    dataset_id=result.dataset_type,
                    task_id=result.metric_type,
                    value=result.metric_value,
                    notes=f"{result.metric_name}; {about}",
                )
            )
    return {
        f"{EVAL_FOLDER}/{name.replace('/', '--')}.yaml": yaml.safe_dump(
            eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True
        ).encode()
        for name, entries in found.items()
    }


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("hf_backdoor_defense.hub"),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown, not HTML: markdown.py escapes
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("card.md.j2")


def _metadata(evidence: Evidence, publication: Publication) -> ModelCardData:
    entry, results = evidence.entry, eval_results(evidence, publication)
    name = method_name(evidence)
    trained = entry.role != "filter" or name == "psim"  # the other filters are rules, not trained
    attacked = entry.role == "attacked" or entry.attacked is not None
    names = [name, *(str(fields["name"]) for fields in together(evidence))]
    tags = ["backdoor-defense", *names, "generated_from_trainer" if trained else "", "backdoored" if attacked else ""]
    base: dict[str, Any] = (
        {"base_model": publication.base_model, "base_model_relation": entry.relation} if publication.base_model else {}
    )
    return ModelCardData(
        **base,
        license=publication.license,
        license_name="other" if publication.license == "other" else None,  # the Hub wants a name: the text says which
        datasets=publication.datasets or None,
        language=publication.language or None,
        library_name=entry.library,
        pipeline_tag=entry.pipeline_tag,
        tags=[re.sub(r"[^\w.-]+", "-", tag)[:64] for tag in tags if tag],
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=publication.repo_id.partition("/")[2] if results else None,
        eval_results=results or None,
    )


def _check(evidence: Evidence, publication: Publication) -> None:
    """Everything the Hub would refuse, and what no card may hold."""
    if publication.repo_id.count("/") != 1 or not is_hub_id(publication.repo_id):
        raise ValueError(
            f"`repo_id` must be ORG/NAME, got {publication.repo_id!r}: the Hub has no other names. Letters, digits, "
            "`-`, `_` and `.`, at most 96 of them, without `--` and `..`."
        )
    check_license(publication.license)
    if publication.base_model is not None and not is_hub_id(publication.base_model):
        raise ValueError(
            f"`base_model` must be a Hub id, got {publication.base_model!r}: the Hub links the card to it. Name the "
            "repository that the base came from, ORG/NAME, or leave it out."
        )
    for name in publication.datasets:
        if not is_hub_id(name):
            raise ValueError(
                f"`datasets` must hold Hub ids, got {name!r}: the Hub links the card to them. Leave out files and "
                "built-in data; the card's text names them."
            )
    for language in publication.language:
        if not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
            raise ValueError(
                f"`language` must be ISO codes, got {language!r}: the Hub knows no other. For English: en."
            )
    if (tag := evidence.entry.pipeline_tag) not in AUTO_CLASSES:
        near = difflib.get_close_matches(str(tag), AUTO_CLASSES, n=1)
        hint = f"Did you mean `{near[0]}`?" if near else f"Known here: {', '.join(AUTO_CLASSES)}."
        raise ValueError(f"`pipeline_tag` must be a task of the Hub with a class to load, got {tag!r}. {hint}")
    bad = [
        key for key, value in evidence.entry.activity.items() if isinstance(value, float) and not math.isfinite(value)
    ]
    if bad:
        raise ValueError(
            f"`activity` must hold finite numbers, got NaN or infinity for {', '.join(map(repr, bad))}: the method's account "
            "is broken, and no card should repeat it. Run again."
        )
