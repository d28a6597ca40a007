"""`hfbd train`"""


def train(argv: list[str]) -> int:
    """Parse, resolve, run; print plan, table and verdict. Returns the exit code."""
    import datasets
    from transformers import TrainingArguments
    from transformers.utils import logging

    from hf_backdoor_defense.cli.options import parse
    from hf_backdoor_defense.experiment.arguments import PRESETS, RunArguments, build_defenses, defaults
    from hf_backdoor_defense.experiment.plan import resolve
    from hf_backdoor_defense.experiment.run import execute

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    presets = {name: {**defaults(), **values} for name, values in {"": {}, **PRESETS}.items()}
    if not any(word == "--preset" or word.startswith("--preset=") for word in argv):
        argv = ["--preset", "", *argv]
    (run, training), specs = parse([RunArguments, TrainingArguments], argv, presets, "hfbd train")
    plan = resolve(run, training, build_defenses(specs))
    print(plan.text(), flush=True)
    if run.dry_run:
        return 0
    print()
    outcome = execute(plan)
    print(f"\n{outcome.table}\n\n{outcome.verdict}")
    for failure in outcome.failures:
        print(failure)
    print(f"\nEverything is in {plan.folder}: start with report.html. The numbers are in results.json, the rows to look at "
          "(if any) in suspects.jsonl.")  # fmt: skip
    return outcome.exit_code
