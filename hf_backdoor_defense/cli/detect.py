"""`hfbd detect`"""


def detect(argv: list[str]) -> int:
    """Parse, resolve, run; print plan, table and verdict. Returns the exit code."""
    import datasets
    from transformers.utils import logging

    from hf_backdoor_defense.cli.options import parse
    from hf_backdoor_defense.experiment.detect import DetectArguments, resolve
    from hf_backdoor_defense.experiment.detect_run import execute

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    (args,), specs = parse([DetectArguments], argv, {}, "hfbd detect")
    if specs:
        raise ValueError(
            "hfbd detect looks at texts with a filter and takes no --defense. To train with one: hfbd train."
        )
    plan = resolve(args)
    print(plan.text(), flush=True)
    if args.dry_run:
        return 0
    print()
    outcome = execute(plan)
    print("\n".join(part for part in (f"\n{outcome.table}\n" if outcome.table else "", outcome.verdict) if part))
    for failure in outcome.failures:
        print(failure)
    if outcome.records:
        print(f"\nThe answer to each text is in {plan.folder / 'scores.jsonl'}, in the order of the input.")
    return outcome.exit_code
