"""`hfbd attack`"""


def attack(argv: list[str]) -> int:
    """Parse, resolve, run; print plan, tables and verdict. Returns the exit code."""
    import datasets
    from transformers.utils import logging

    from hf_backdoor_defense.cli.options import given, parse
    from hf_backdoor_defense.experiment.attack import KINDS, AttackArguments, _known
    from hf_backdoor_defense.experiment.attack_plan import resolve
    from hf_backdoor_defense.experiment.attack_run import execute
    from hf_backdoor_defense.experiment.implant import IMPLANTS

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    name = given(argv, "attack")
    if name in IMPLANTS:
        return implant(argv)
    if name is not None:
        _known("attack", name, [*KINDS, *IMPLANTS])
    (run,), specs = parse([AttackArguments], argv, {}, "hfbd attack")
    if specs:
        raise ValueError(
            "hfbd attack takes filters, not defenses: --filters psim. To train with a defense: hfbd train."
        )
    plan = resolve(run)
    print(plan.text(), flush=True)
    if run.dry_run:
        return 0
    print()
    outcome = execute(plan)
    print(f"\n{outcome.table}\n\n{outcome.verdict}")
    for note in outcome.notes:
        print(note)
    print(f"\nEverything is in {plan.folder}: the numbers in results.json, the tables in table.txt.")
    if run.save_models:
        print("The poisoned models in its folder `models` are marked as such: do not deploy them.")
    return outcome.exit_code


def implant(argv: list[str]) -> int:
    """`hfbd attack --attack por|neuba|badpre`: on a pretrained model, with plain text. Returns the exit code."""
    from hf_backdoor_defense.cli.options import parse
    from hf_backdoor_defense.experiment.implant import ImplantArguments, resolve
    from hf_backdoor_defense.experiment.implant_run import execute

    (run,), specs = parse([ImplantArguments], argv, {}, "hfbd attack")
    if specs:
        raise ValueError("hfbd attack takes no defenses. To clean the model that it makes: hfbd clean.")
    plan = resolve(run)
    print(plan.text(), flush=True)
    if run.dry_run:
        return 0
    print()
    outcome = execute(plan)
    print(f"\n{outcome.table}\n\n{outcome.verdict}")
    for failure in outcome.failures:
        print(failure)
    print(
        f"\nThe attacked model is in {plan.folder / 'model'}, marked as such: do not deploy it. The numbers are in results.json."
    )
    return outcome.exit_code
