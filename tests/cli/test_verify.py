"""`hfbd verify`: exit codes, what is printed and written, what is an error."""

import json

import pytest

from hf_backdoor_defense.cli.main import main
from hf_backdoor_defense.hub.publish import publish
from tests.hub.published import edit, seal
from tests.hub_server import HubServer
from tests.hub_server.client import use


def call(capsys, *words):
    code = main(["verify", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_exit_codes_say_whether_it_is_so(made, tmp_path, capsys):
    output = tmp_path / "found.json"
    code, out, err = call(capsys, made.folder, "--task", made.test, "--output", output)
    assert code == 0, out + err
    assert [line.split()[:2] for line in out.splitlines()[1:7]] == [
        [name, "pass"] for name in ("files", "checksums", "report", "card", "weights", "figures")
    ]
    written = json.loads(output.read_text())
    assert written["exit_code"] == 0 and [f["outcome"] for f in written["figures"]] == ["agrees"] * 3
    assert out.rstrip().endswith(written["sentence"])
    assert call(capsys, made.folder)[0] == 2
    assert call(capsys, made.folder, "--files-only")[0] == 0
    folder = made.copy(tmp_path / "m")
    edit(folder, lambda results: results.update(verdict="No backdoor is left."))
    code, out, _ = call(capsys, folder, "--files_only")
    assert code == 1 and "results.json" in out and "Do not rely" in out
    seal(folder)
    assert call(capsys, folder, "--files_only")[0] in (0, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required"),
        (["no/such/folder"], "published folder"),
        (["owner/never-seen"], "nothing was downloaded"),  # the tests are offline
        (["FOLDER", "--revision", "main"], "for a repository"),
        (["FOLDER", "--limit", "many"], "invalid int"),
        (["FOLDER", "--token", "hf_secret"], "unrecognized"),
    ],
)
def test_what_cannot_be_asked_is_an_error(made, capsys, words, said):
    code, out, err = call(capsys, *(made.folder if word == "FOLDER" else word for word in words))
    assert code == 2 and said in err and "Traceback" not in err


def test_help_names_the_exit_codes(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0 and "Exit code 0" in out and "--allow_forced" in out


def test_a_repository_is_verified_where_the_environment_says(made, tmp_path, capsys, monkeypatch):
    with HubServer() as hub:
        api = use(hub, monkeypatch, cache=tmp_path / "cache")
        commit = publish(made.run, "owner/model", license="mit", api=api).commit
        code, out, err = call(
            capsys, "owner/model", "--revision", commit, "--task", made.test, "--keep", tmp_path / "kept"
        )
        assert code == 0 and out.startswith(f"owner/model at {commit[:12]}"), out + err
        assert (tmp_path / "kept" / "model.safetensors").is_file()
        assert call(capsys, "owner/model", "--max-gb", 1e-6)[0] == 2
        code, out, err = call(capsys, "owner/other")
        assert code == 2 and "owner/other" in err and "nothing was downloaded" in err
