"""`hfbd push` as it is typed: what it prints, its exit codes, and that a token never is an option."""

import pytest

from hf_backdoor_defense.cli.main import main
from tests.hub.small_run import small_run
from tests.hub_server import HubServer
from tests.hub_server.client import use
from tests.trainers.toys import bert

REPO = "owner/cleaned"


@pytest.fixture
def run(tmp_path):
    return str(small_run(tmp_path / "run", bert(labels=2)))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        use(server, monkeypatch, cache=tmp_path / "cache")
        yield server


def push(capsys, *argv):
    code = main(["push", *argv])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_dry_run_shows_files_and_card_and_asks_nothing(hub, run, capsys):
    code, out, err = push(capsys, run, "--repo", REPO, "--license", "mit", "--dry-run")
    assert code == 0 and hub.requests == []
    assert f"{REPO} would hold:" in out and "model.safetensors" in out and "28.8 kB" in out
    assert "--- README.md ---\n---\nbase_model: owner/encoder\n" in out and "license: mit" in out
    assert out.endswith("Nothing was sent. Leave out --dry_run to publish.\n")
    assert "unknown" not in out.partition("---")[0]


def test_publishing_prints_what_where_and_how_to_verify(hub, run, capsys):
    code, out, err = push(capsys, run, "--repo", REPO, "--license", "mit", "--private", "true", "--message", "first")
    repo = hub.repos[REPO]
    assert code == 0 and repo.private and repo.history[0].title == "first"
    assert "Published 9 files" in out and f"\n{hub.url}/{REPO}\ncommit {repo.head.oid}\n" in out
    assert out.endswith(f"verify it: hfbd verify {REPO}\n") and "Upload" not in err
    code, out, err = push(capsys, run, "--repo", REPO, "--license", "mit")
    assert code == 0 and "Nothing to do" in out and "No files have been modified" not in err


def test_options_reach_the_card(hub, run, capsys):
    options = "--license mit --base_model owner/other --datasets owner/a owner/b --language en de --arm d3 --seed 0 --revision v1"
    code, out, _ = push(capsys, run, "--repo", REPO, *options.split())
    assert code == 0 and out.endswith(f"hfbd verify {REPO} --revision v1\n")
    repo = hub.repos[REPO]
    card = repo.commits[repo.branches["v1"]].files["README.md"].content.decode()
    for line in ("base_model: owner/other", "- owner/a", "- owner/b", "- en", "- de"):
        assert f"\n{line}\n" in card
    assert not repo.private


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--license", "nothing"], "license"),
        (["--license", "mit", "--arm", "dece"], "got 0"),
        (["--license", "mit", "--private", "maybe"], "must be true or false"),
        (["--license", "mit", "--token", "hf_x"], "unrecognized arguments"),
        (["--license", "mit", "--attacked", "--private", "false"], "must stay private"),
    ],
)
def test_bad_options_end_with_2_and_change_nothing(hub, run, capsys, options, says):
    code, out, err = push(capsys, run, "--repo", REPO, *options)
    assert code == 2 and says in err and hub.requests == [] and "Traceback" not in err


def test_what_the_hub_refuses_ends_with_2(hub, run, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, out, err = push(capsys, run, "--repo", REPO, "--license", "mit")
    assert code == 2 and err.startswith("hfbd: The token must be valid") and "hf_wrong" not in out + err
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.break_at("commit")
    code, out, err = push(capsys, run, "--repo", REPO, "--license", "mit")
    assert code == 2 and "nothing was published" in err.splitlines()[-1] and "Traceback" not in err


def test_what_is_left_out_is_named(hub, tmp_path, capsys):
    folder = tmp_path / "run"
    small_run(folder, bert(labels=2))
    (folder / "model" / "training_args.bin").write_bytes(b"\x80\x02}.")
    code, out, _ = push(capsys, str(folder), "--repo", REPO, "--license", "mit")
    assert code == 0 and "left out: 'training_args.bin' (left by a Trainer)" in out
    assert "training_args.bin" not in hub.repos[REPO].files


def test_help_and_a_missing_repository_name(capsys, run):
    code, out, _ = push(capsys, "--help")
    assert code == 0 and "--dry_run" in out and "token" in out and "--token" not in out
    code, _, err = push(capsys, run)
    assert code == 2 and "--repo" in err
