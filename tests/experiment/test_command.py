"""The command that repeats a run, parsed again, asks for the same run."""

import shlex

import pytest
from transformers import TrainingArguments

from hf_backdoor_defense.cli.options import parse
from hf_backdoor_defense.experiment.arguments import PRESETS, RunArguments, build_defenses, defaults
from hf_backdoor_defense.experiment.command import command

REQUESTS = {
    "nothing but a task": "--task a.jsonl",
    "a preset": "--preset offline",
    "a trigger with spaces": "--task a.jsonl --simulate insent --trigger 'I watched this, twice' --clean_label true",
    "many options": "--task 'my data.csv' --seeds 3 1 2 --limit 50 --frozen_layers 0 --baselines false --max_ca_drop 0.03 "
    "--adam_beta2 0.98 --bf16 false --weight_decay 1e-6 --optim sgd --lr_scheduler_type cosine --use_cpu true "
    "--gradient_accumulation_steps 4 --max_steps 7 --train_sampling_strategy group_by_length --logging_steps 5 "
    "--lr_scheduler_kwargs '{\"num_cycles\": 2}' --report_to tensorboard --save_strategy no",
    "a name with a token in it": "--task a.jsonl --average_tokens_across_devices false",
    "methods with fields": "--task a.jsonl --defense dece trajectory --defense.dece.alpha_base 0.8 "
    "--defense.dece.schedule fractional --defense.trajectory.fractions '[0, 0.5]' --defense.trajectory.drop_share 0.02",
}


def ask(words: list[str]):
    presets = {name: {**defaults(), **values} for name, values in {"": {}, **PRESETS}.items()}
    words = words if "--preset" in words else ["--preset", "", *words]
    (run, training), specs = parse([RunArguments, TrainingArguments], words, presets, "hfbd train")
    return run, training, build_defenses(specs)


@pytest.mark.parametrize("name", REQUESTS)
def test_the_command_asks_for_the_same_run(name: str, tmp_path) -> None:
    run, training, defenses = ask([*shlex.split(REQUESTS[name]), "--output_dir", str(tmp_path)])
    line = shlex.join(command(run, training, defenses))
    assert line.startswith("hfbd train ") and str(tmp_path) not in line
    again, training_again, defenses_again = ask(shlex.split(line)[2:])
    assert again == run and defenses_again == defenses
    left_out = ("output_dir", "logging_dir", "run_name")
    before, after = (
        {k: v for k, v in args.to_dict().items() if k not in left_out} for args in (training, training_again)
    )
    assert before == after and training_again.output_dir == "runs/again"


def test_only_what_differs_is_said() -> None:
    run, training, defenses = ask(["--task", "a.jsonl", "--learning_rate", "5e-5", "--defense", "dece"])
    assert (
        command(run, training, defenses) == "hfbd train --task a.jsonl --output_dir runs/again --defense dece".split()
    )
