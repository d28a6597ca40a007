"""`hfbd list` and `hfbd env`: what they show is what the classes and the machine are, and they are quick to start."""

import dataclasses
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys

import pytest
import torch

from hf_backdoor_defense.attacks.image_triggers import IMAGE_TRIGGERS
from hf_backdoor_defense.attacks.triggers import TRIGGERS
from hf_backdoor_defense.cli.main import main
from hf_backdoor_defense.experiment import machine as machine_module
from hf_backdoor_defense.experiment.arguments import PRESETS
from hf_backdoor_defense.experiment.inventory import NEEDED, entries, find
from hf_backdoor_defense.experiment.machine import OPTIONAL, describe, machine
from hf_backdoor_defense.registry import (
    ATTACKS,
    COMPARATORS,
    CONTROLS,
    DEFENSES,
    DETECTORS,
    FILTERS,
    GENERATIVE,
    PRETRAINING,
    PURIFIERS,
    filter_class,
    objective_class,
)

METHODS = [*DEFENSES, *COMPARATORS, *CONTROLS, *PRETRAINING, *PURIFIERS, *GENERATIVE, *ATTACKS, *DETECTORS]
ALL_TRIGGERS = {**TRIGGERS, **IMAGE_TRIGGERS}
TABLES = {
    "defenses": DEFENSES,
    "comparators": COMPARATORS,
    "controls": CONTROLS,
    "pretraining": PRETRAINING,
    "purifiers": PURIFIERS,
    "generative": GENERATIVE,
    "triggers": ALL_TRIGGERS,
    "presets": PRESETS,
    "attacks": ATTACKS,
    "detectors": DETECTORS,
    "filters": FILTERS,
}


def off(found):
    return {item["feature"]: item["why"] for item in found["off"]}


def test_list_names_everything_once_by_kind(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    blocks = dict(zip(TABLES, printed.split("\n\n"), strict=False))
    for kind, names in TABLES.items():
        head, *lines = blocks[kind].splitlines()
        assert head.startswith(f"{kind} (") and [line.split()[0] for line in lines] == list(names)
        assert all(len(line.split(maxsplit=1)[1]) > 10 for line in lines)
    assert all(len(line) <= 140 for line in printed.splitlines())


@pytest.mark.parametrize("name", [*METHODS, *ALL_TRIGGERS])
def test_what_the_source_says_is_what_the_class_is(name):
    kind = ALL_TRIGGERS.get(name) or objective_class(name)
    entry = next(entry for entry in find(name) if entry.kind != "filters")
    assert entry.line and entry.line == " ".join(inspect.getdoc(kind).split("\n\n")[0].split())
    assert entry.paper == getattr(kind, "paper", None) and entry.presets == dict(getattr(kind, "presets", {}))
    real = {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)}
    assert {item.name: eval(item.default, {}) for item in entry.fields} == real


def test_a_run_preset_is_shown_as_it_is():
    for name, values in PRESETS.items():
        (entry,) = find(name)
        assert {item.name: eval(item.default, {}) for item in entry.fields} == values


@pytest.mark.parametrize("name", FILTERS)
def test_what_the_source_says_of_a_filter_is_what_its_constructor_takes(name):
    kind = filter_class(name)
    entry = next(entry for entry in find(name) if entry.kind == "filters")
    assert entry.line == " ".join(inspect.getdoc(kind).split("\n\n")[0].split()) and entry.paper == kind.paper
    taken = inspect.signature(kind).parameters.values()
    real = {p.name: p.default for p in taken if p.kind is p.KEYWORD_ONLY}
    assert list(real) == [item.name for item in entry.fields]
    for item in entry.fields:
        assert (
            item.default == NEEDED
            if real[item.name] is inspect.Parameter.empty
            else eval(item.default, {}) == real[item.name]
        )


def test_a_filter_and_what_it_trains_are_both_shown(capsys):
    assert main(["list", "psim"]) == 0
    printed = capsys.readouterr().out
    assert "psim (detectors)" in printed and "psim (filters)" in printed and "stop_margin = " in printed
    assert "base_sha256 = (needed)" in printed


def test_a_text_that_begins_below_its_names_is_shown_behind_each_of_them(capsys):
    assert main(["list", "ulrl"]) == 0
    printed = capsys.readouterr().out
    for name in ("unlearn_lr = 0.01", "unlearn_clip = 20.0"):
        assert re.search(rf"^  {re.escape(name)} +the ascent: rate", printed, re.M)


def test_a_name_shows_fields_defaults_presets_and_what_they_mean(capsys):
    assert main(["list", "dece", "smoothed"]) == 0
    printed = capsys.readouterr().out
    assert "alpha_base = 0.985" in printed and "share of the prediction in the mixture" in printed
    assert "preset llm: alpha_base = 0.8, label_smoothing = 0.05" in printed and "arXiv 2407.08956" in printed
    assert "smoothed (comparators)" in printed
    assert main(["list", "--verbose", "focal"]) == 0
    assert capsys.readouterr().out.startswith("focal (comparators)")
    assert main(["list", "--verbose"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{entry.name} ({entry.kind})" in printed for entry in entries())


@pytest.mark.parametrize(("typo", "meant"), [("dec", "dece"), ("insend", "insent"), ("trajectry", "trajectory")])
def test_an_unknown_name_is_an_error_with_a_suggestion(capsys, typo, meant):
    assert main(["list", typo]) == 2
    assert f"did you mean `{meant}`?" in capsys.readouterr().err
    assert main(["list", "--verbos"]) == 2


def test_a_name_that_is_near_nothing_gets_no_suggestion(capsys):
    assert main(["list", "xyzzy"]) == 2
    printed = capsys.readouterr().err
    assert "`xyzzy`" in printed and "did you mean" not in printed


def test_list_loads_nothing_heavy():
    code = (
        "import sys; from hf_backdoor_defense.cli.main import main; main(['list']); main(['list', '--verbose']);"
        "bad = {'torch', 'transformers', 'trl', 'datasets', 'peft'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_env_loads_torch_and_none_of_the_rest():
    code = (
        "import sys; from hf_backdoor_defense.cli.main import main; assert main(['env']) == 0;"
        "bad = {'transformers', 'trl', 'datasets', 'peft', 'matplotlib'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_env_says_what_this_machine_is(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__ and found["torch_build"]["cuda"] == torch.version.cuda
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert len([device for device in found["devices"] if device["kind"] == "cuda"]) == torch.cuda.device_count()
    installed = {dist.metadata["Name"].lower().replace("_", "-") for dist in importlib.metadata.distributions()}
    for name, distribution in OPTIONAL.items():
        assert (found["packages"][name] is not None) == (distribution in installed), name
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and all(why in printed for why in off(found).values())


@pytest.mark.parametrize("name", OPTIONAL)
def test_each_missing_package_is_a_line_and_no_crash(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # what an import of it then meets
    found = machine()
    assert found["packages"][name] is None
    assert any(OPTIONAL[name] in why for why in off(found).values()) or name == "liger_kernel"
    assert f"{name} " in describe(found) and "not installed" in describe(found)


def test_a_module_without_metadata_or_spec_is_there_with_an_unknown_version(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", type(sys)("wandb"))  # its __spec__ is None
    assert machine()["packages"]["wandb"] == "unknown"


def present(**missing):
    return {**dict.fromkeys(OPTIONAL, "1.0"), **missing}


def reasons(packages=None, flags=None, cuda=0):
    devices = [{"kind": "cuda", "index": i, "name": "GPU", "bytes": 2**30} for i in range(cuda)]
    all_flags = {**dict.fromkeys(machine_module.FLAGS), **(flags or {})}
    return off({"off": machine_module._off(packages or present(liger_kernel=None), all_flags, devices)})


def test_what_is_off_follows_from_devices_packages_and_flags():
    assert reasons(cuda=1) == {}
    assert set(reasons()) == {"4-bit and 8-bit bases", "compiled fused loss"}
    assert "no CUDA device" in reasons()["4-bit and 8-bit bases"]
    assert set(reasons(present(bitsandbytes=None, liger_kernel=None), cuda=1)) == {"4-bit and 8-bit bases"}
    assert "nn.DataParallel" in reasons(cuda=2)["several GPUs in one process"]
    assert "always refused" in reasons(present(), cuda=1)["use_liger_kernel"]


@pytest.mark.parametrize(("value", "is_off"), [("1", True), ("true", True), ("0", False), ("", False), (None, False)])
def test_an_offline_flag_that_is_set_is_said(value, is_off):
    assert ("downloads by Hub id" in reasons(flags={"HF_HUB_OFFLINE": value}, cuda=1)) == is_off


def test_a_reader_that_goes_away_is_no_error():
    """As `hfbd list | head -1`: the pipe is closed before anything is read."""
    command = [sys.executable, "-c", "from hf_backdoor_defense.cli.main import entry; entry()", "list"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    assert run.stderr.read() == "" and run.wait() == 141
