"""What a hosted Trainer publishes: its output folder as the folder of a run, with results, seal and card.

    trainer  ->  OUTPUT_DIR/results.json, checksums.json, report.html  ->  publish

What stands in the results: `training_results.py`. The output folder stays a run folder: `hfbd push OUTPUT_DIR` publishes
it again without the Trainer. Only the main process writes.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token

from hf_backdoor_defense.evaluation.evaluator import BackdoorScores
from hf_backdoor_defense.hub.bases import base_on_hub
from hf_backdoor_defense.hub.card import CARD, render_card
from hf_backdoor_defense.hub.evidence import Publication, read_evidence
from hf_backdoor_defense.hub.faults import LOGIN, explained
from hf_backdoor_defense.hub.licenses import inherited_license
from hf_backdoor_defense.hub.publish import publish
from hf_backdoor_defense.hub.training_results import write_trained
from hf_backdoor_defense.reporting.results import write_bytes

_RENAMED = {"finetuned_from": "base_model", "dataset_tags": "datasets"}  # of the Trainer's own card
_OPTIONS = ("base_model", "datasets", "language", "license")
_OF_OTHER_CARDS = ("model_name", "tags", "tasks", "dataset", "dataset_args", "dataset_name")


def repository(args: Any, *, token: str | None = None, ask: bool = True) -> str:
    """Where the arguments want the model to go, "ORG/NAME"; a name alone is completed by whose token it is.

    Args:
        ask: False asks the Hub nothing.

    Raises:
        ValueError: no token, or a name without its owner that nobody may be asked about.

    >>> from transformers import TrainingArguments
    >>> repository(TrainingArguments(hub_model_id="me/model"), ask=False)
    'me/model'
    """
    name = str(args.hub_model_id or Path(args.output_dir).absolute().name)
    if "/" in name:
        return name
    if not ask or constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"`hub_model_id` must name owner and model, ORG/NAME, got {name!r}: the Hub is not asked whose token it is. Write it "
            "in full."
        )
    token = token or args.hub_token or get_token()
    if not token:
        raise ValueError(
            f"A token must be there to publish `{name}`, and none was found: nothing was published. {LOGIN}."
        )
    with explained(name, "nothing was published"):
        return f"{HfApi().whoami(token=token)['name']}/{name}"


def publish_trained(
    trainer: Any,
    repo_id: str,
    *,
    scores: BackdoorScores | None = None,
    clean_reference_scores: BackdoorScores | None = None,
    blocking: bool = True,
    dry_run: bool = False,
    card: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Write results, seal and report beside the saved model, publish all of it, and leave the card there.

    Args:
        trainer: hosted; its model was saved into its output folder.
        scores, clean_reference_scores: what `evaluate_backdoor` returned for the model, and for one that was never poisoned.
        blocking: False publishes in a thread and returns its future.
        card: `license`, `language`, `datasets`, `base_model`, and the Trainer's own words for them.
        options: of `publish`.

    Returns:
        `Published`.

    Raises:
        ValueError: as `publish` and `write_trained`. TypeError: an option that no card has.
    """
    options |= card_options(card or {})
    folder = write_trained(trainer, scores=scores, clean_reference_scores=clean_reference_scores)

    def go() -> Any:
        done = publish(folder, repo_id, dry_run=dry_run, **options)
        write_bytes(folder / CARD, done.card.encode())
        return done

    return go() if blocking or dry_run else HfApi().run_as_future(go)


def write_card(trainer: Any, repo_id: str, **card: Any) -> Path:
    """Results, seal and our card in the output folder, for a model that is saved there. Asks the Hub for the base's license only.

    Raises:
        ValueError: as `write_trained`. TypeError: an option that no card has.
    """
    options = card_options(card)
    folder = write_trained(trainer)
    evidence = read_evidence(folder)
    entry = evidence.entry
    about = Publication(
        repo_id=repo_id,
        arm=entry.arm,
        seed=entry.seed,
        license=options.get("license")
        or (inherited_license(entry.base_model) if entry.base_model else None)
        or "unknown",
        base_model=options.get("base_model") or base_on_hub(entry.base_model),
        datasets=options.get("datasets") or [],
        language=options.get("language") or [],
        forced=bool(evidence.failures),
    )
    return write_bytes(folder / CARD, str(render_card(evidence, about)).encode())


def card_options(card: dict[str, Any]) -> dict[str, Any]:
    """What a card takes of what the Trainer's own takes; words that only that one has are left out.

    Raises:
        TypeError: a word of neither.

    >>> card_options({"finetuned_from": "owner/base", "dataset_tags": "owner/rows", "tags": ["x"]})
    {'base_model': 'owner/base', 'datasets': ['owner/rows']}
    """
    found: dict[str, Any] = {}
    for key, value in card.items():
        name = _RENAMED.get(key, key)
        if name not in _OPTIONS and name not in _OF_OTHER_CARDS:
            raise TypeError(
                f"push_to_hub() got an unexpected keyword argument {key!r}: a card takes {', '.join(_OPTIONS)}. What it says of "
                "the model comes from the results."
            )
        if name in _OPTIONS and value is not None:
            several = name in ("datasets", "language") and isinstance(value, str)
            found[name] = [value] if several else value
    return found
