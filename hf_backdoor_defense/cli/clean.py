"""`hfbd clean`"""


def clean(argv: list[str]) -> int:
    """Parse, resolve, run; print plan, table and verdict. Returns the exit code."""
    import datasets
    from transformers.utils import logging

    from hf_backdoor_defense.cli.options import parse
    from hf_backdoor_defense.experiment.clean import PRESETS, CleanArguments, build_method
    from hf_backdoor_defense.experiment.clean_plan import resolve
    from hf_backdoor_defense.experiment.clean_run import execute

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if any(word == "--defense" or word.startswith("--defense=") for word in argv):
        raise ValueError("hfbd clean takes its method by --method, and the method's fields by --defense.FIELD VALUE.")
    if not any(word == "--preset" or word.startswith("--preset=") for word in argv):
        argv = ["--preset", "", *argv]
    (run,), specs = parse([CleanArguments], argv, PRESETS, "hfbd clean")
    run.check()
    if len(specs) != 1:
        raise ValueError(
            f"`defense` must hold the fields of one method, got {specs}. For example: defense: {{dose: 1.0}}."
        )
    plan = resolve(run, build_method(run.method, specs[0]))
    print(plan.text(), flush=True)
    if run.dry_run:
        return 0
    print()
    outcome = execute(plan)
    print(f"\n{outcome.table}\n\n{outcome.verdict}")
    for failure in outcome.failures:
        print(failure)
    print(f"\nThe model is in {plan.folder / 'model'}. Load it with load_pretrained_whole where its masked-LM head is wanted: "
          "other ways drop the pooler. The numbers are in results.json.")  # fmt: skip
    if plan.attacked is not None:
        print("The input was attacked on purpose, and what came of it stays marked: do not deploy it.")
    return outcome.exit_code
