"""`hfbd` is one process: several are refused at once, whatever the verb and before anything is read."""

import pytest

from hf_backdoor_defense.cli.main import VERBS, main
from hf_backdoor_defense.experiment.purify import purify


@pytest.mark.parametrize("verb", VERBS)
def test_several_processes_are_refused(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main([verb, "--output_dir", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"`hfbd {verb}` runs in one process, and 3 were started" in err
    assert "Start it once" in err and "--shard i/n" in err and "a script of your own" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["1", ""])
def test_a_launcher_with_one_process_is_fine(size, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", size)
    assert main(["list"]) == 0
    assert capsys.readouterr().out


def test_help_needs_no_single_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--help"]) == 0


def test_purify_is_refused_before_it_reads_anything(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"purify\(\) runs in one process, and 2 were started.*DefendedTrainer"):
        purify("no model of this name", None, output_dir=tmp_path / "out")
    assert not list(tmp_path.iterdir())
