"""The command `hfbd`. Exit codes: 0 ran and gates met, 1 a gate failed or a defense was inert, 2 an error."""

import os
import sys
import traceback

VERBS = {
    "train": "fine-tune with a defense; with --simulate, measure it against an attack and its controls",
    "attack": "poison a base, fine-tune it on clean data as a victim would, measure filters before it",
    "eval": "measure a finished model on clean and triggered rows",
    "detect": "score a file of texts with a filter that was calibrated on clean ones",
    "clean": "clean a pretrained model on plain text, or purify a trained classifier with a few labeled rows",
    "scan": "look for outlying rows in a checkpoint's input embedding, and reset them in a copy",
    "push": "publish a model of a finished run with its card and evidence; --dry_run shows what would be sent",
    "verify": "check a published model: files, checksums, card and weights; measure its figures again",
    "report": "make the report of a run again, or one report of several runs",
    "list": "name the defenses, controls, purifiers, triggers, presets, attacks and filters; with a NAME, its fields",
    "env": "show versions, devices and packages, and what is off on this machine and why",
}
USAGE = "usage: hfbd VERB [options]\n\n" + "\n".join(f"  {verb:8} {what}" for verb, what in VERBS.items())


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code.

    >>> main(["--help"])  # doctest: +ELLIPSIS
    usage: hfbd VERB [options]
    ...
    0
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE + "\n\nhfbd VERB --help lists a verb's options.")
        return 0 if argv else 2
    if argv[0] == "--version":
        from hf_backdoor_defense import __version__

        print(__version__)
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        print(f"hfbd: there is no verb `{verb}`.\n\n{USAGE}", file=sys.stderr)
        return 2
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    if processes > 1:
        print(
            f"hfbd: `hfbd {verb}` runs in one process, and {processes} were started (WORLD_SIZE): each would do all of it and "
            "write to the same folder. Start it once, without torchrun or accelerate launch. Many runs: one process each, as "
            "`--shard i/n` of a benchmark does; one training on many GPUs: a script of your own (docs/distributed.md).",
            file=sys.stderr,
        )
        return 2
    # Nothing here needs the parallel tokenizers, and their warning after a fork would be the first thing a user reads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if verb == "train":
            from hf_backdoor_defense.cli.train import train

            return train(rest)
        if verb == "attack":
            from hf_backdoor_defense.cli.attack import attack

            return attack(rest)
        if verb == "detect":
            from hf_backdoor_defense.cli.detect import detect

            return detect(rest)
        if verb == "clean":
            from hf_backdoor_defense.cli.clean import clean

            return clean(rest)
        if verb == "scan":
            from hf_backdoor_defense.cli.scan import scan

            return scan(rest)
        if verb == "push":
            from hf_backdoor_defense.cli.push import push

            return push(rest)
        if verb == "verify":
            from hf_backdoor_defense.cli.verify import verify

            return verify(rest)
        if verb == "report":
            from hf_backdoor_defense.cli.report import report

            return report(rest)
        if verb == "list":
            from hf_backdoor_defense.cli.list import show

            return show(rest)
        if verb == "env":
            from hf_backdoor_defense.cli.env import env

            return env(rest)
        from hf_backdoor_defense.cli.eval import evaluate

        return evaluate(rest)
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a bad option
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print("\nhfbd: stopped. The same command continues the run.", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"hfbd: {error}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        print("hfbd: this is a bug of ours; please report it with the lines above.", file=sys.stderr)
        return 2


def entry() -> None:
    """Console script. Where the reader of its output went away (`| head`), it ends quietly, with the code of shells for that."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more on its way out
        code = 141
    sys.exit(code)


if __name__ == "__main__":
    entry()
