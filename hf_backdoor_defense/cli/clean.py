"""`hfbd clean`: a pretrained model on plain text (recipe), or a trained classifier on labeled clean rows (d3, ulrl, …)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_backdoor_defense.experiment.summary import Outcome


def clean(argv: list[str]) -> int:
    """Parse, resolve, run; print plan, table and verdict. Returns the exit code."""
    import datasets
    from transformers.utils import logging

    from hf_backdoor_defense.cli.options import given
    from hf_backdoor_defense.experiment.attack import _known
    from hf_backdoor_defense.experiment.clean import METHODS
    from hf_backdoor_defense.experiment.purify_training import METHODS as PURIFYING

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if any(word == "--defense" or word.startswith("--defense=") for word in argv):
        raise ValueError("hfbd clean takes its method by --method, and the method's fields by --defense.FIELD VALUE.")
    if not any(word == "--preset" or word.startswith("--preset=") for word in argv):
        argv = ["--preset", "", *argv]
    method = given(argv, "method") or "recipe"
    _known("method", method, (*METHODS, *PURIFYING))
    purifies = method in PURIFYING
    if {"-h", "--help"} & {*argv}:
        here, there = (PURIFYING, METHODS) if purifies else (METHODS, PURIFYING)
        print(
            f"These are the options of --method {'|'.join(here)}. Those of {'|'.join(there)} (for "
            f"{'a pretrained model and plain text' if purifies else 'a trained classifier and labeled clean rows'}): "
            f"hfbd clean --method {next(iter(there))} --help\n"
        )
    return _purify(argv, method) if purifies else _pretrain(argv)


def _purify(argv: list[str], method: str) -> int:
    from hf_backdoor_defense.cli.options import parse
    from hf_backdoor_defense.experiment.purify_arguments import PRESETS, PurifyArguments
    from hf_backdoor_defense.experiment.purify_plan import resolve
    from hf_backdoor_defense.experiment.purify_run import execute
    from hf_backdoor_defense.experiment.purify_training import build_purifier

    if any(word == "--text" or word.startswith("--text=") for word in argv):
        raise ValueError(f"{method} learns from labeled rows, --clean; plain text, --text, is for --method recipe.")
    (run,), specs = parse([PurifyArguments], argv, PRESETS, "hfbd clean")
    run.check()
    plan = resolve(run, build_purifier(run.method, _one(specs)))
    outcome = _done(plan, execute)
    if outcome is None:
        return 0
    print(
        f"\nThe model is in {plan.folder / 'model'}, the evidence in report.html, the numbers in results.json beside it."
    )
    if plan.classifier.attacked is not None:
        print("The input was attacked on purpose, and what came of it stays marked: do not deploy it.")
    return outcome.exit_code


def _pretrain(argv: list[str]) -> int:
    from hf_backdoor_defense.cli.options import parse
    from hf_backdoor_defense.experiment.clean import PRESETS, CleanArguments, build_method
    from hf_backdoor_defense.experiment.clean_plan import resolve
    from hf_backdoor_defense.experiment.clean_run import execute

    if any(word == "--clean" or word.startswith("--clean=") for word in argv):
        raise ValueError(
            "recipe learns from plain text, --text; labeled rows, --clean, are for --method d3, ulrl, ft_sam, fine_pruning or "
            "fine_tuning."
        )
    (run,), specs = parse([CleanArguments], argv, PRESETS, "hfbd clean")
    run.check()
    plan = resolve(run, build_method(run.method, _one(specs)))
    outcome = _done(plan, execute)
    if outcome is None:
        return 0
    print(f"\nThe model is in {plan.folder / 'model'}. Load it with load_pretrained_whole where its masked-LM head is wanted: "
          "other ways drop the pooler. The numbers are in results.json.")  # fmt: skip
    if plan.attacked is not None:
        print("The input was attacked on purpose, and what came of it stays marked: do not deploy it.")
    return outcome.exit_code


def _done(plan: Any, execute: Callable[[Any], "Outcome"]) -> "Outcome | None":
    """Show the plan, carry it out, show what came of it; None where only the plan was asked for."""
    print(plan.text(), flush=True)
    if plan.run.dry_run:
        return None
    print()
    outcome = execute(plan)
    print(f"\n{outcome.table}\n\n{outcome.verdict}")
    for failure in outcome.failures:
        print(failure)
    return outcome


def _one(specs: list[dict[str, Any]]) -> dict[str, Any]:
    if len(specs) != 1:
        raise ValueError(
            f"`defense` must hold the fields of one method, got {specs}. For example: defense: {{dose: 1.0}}."
        )
    return specs[0]
