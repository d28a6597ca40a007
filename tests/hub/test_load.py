"""Reading `defense.json` and PSIM's filter from a folder and from the Hub: what comes back, and what is never downloaded."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_backdoor_defense import load_defenses
from hf_backdoor_defense.defenses.d3 import D3
from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.fetching import fetched, is_repository
from hf_backdoor_defense.filters import read_filter
from hf_backdoor_defense.input_filters.psim import PSIMFilter
from hf_backdoor_defense.input_filters.rap import RAP
from hf_backdoor_defense.trainers.state import load_objective, save_objectives
from tests.hub_server import HubServer
from tests.hub_server.client import use
from tests.input_filters import serving_toys as toys
from tests.input_filters.test_psim import fit, fresh, sure


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        server.api = use(server, monkeypatch, cache=tmp_path / "cache")
        yield server


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A calibrated filter and the folder it was saved to."""
    place = tmp_path_factory.mktemp("filter")
    found = fit(place / "fit")
    found.calibrate(fresh(300, 5), target_frr=0.05)
    found.save(place / "filter")
    return found, place / "filter"


def upload(hub, folder, **extra):
    hub.api.create_repo("owner/model", exist_ok=True)
    for name, content in extra.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return hub.api.upload_folder(folder_path=folder, repo_id="owner/model").oid


def downloaded(hub):
    return {r.path.rpartition("/")[2] for r in hub.requests if "/resolve/" in r.path}


# -- defense.json -----------------------------------------------------------------------------------------------------
def test_objectives_come_back_with_fields_and_state(tmp_path, hub):
    folder = tmp_path / "model"
    given = [DeCE(alpha_base=0.9), D3(lam=2.0)]
    save_objectives(given, folder)
    assert [o.to_dict() for o in load_defenses(folder)] == [o.to_dict() for o in given]
    first = upload(hub, folder, pytorch_model__bin=b"\x80\x04K\x01.", run__py=b"raise SystemExit")
    save_objectives([DeCE(alpha_base=0.8)], folder)
    upload(hub, folder)
    assert [o.to_dict() for o in load_defenses("owner/model", revision=first)] == [o.to_dict() for o in given]
    assert [o.alpha_base for o in load_defenses("owner/model")] == [0.8]
    assert load_objective(DeCE, "owner/model", revision=first).alpha_base == 0.9
    assert downloaded(hub) == {"defense.json", "defense.safetensors"}


def test_plain_training_has_no_defense(tmp_path):
    save_objectives([], tmp_path / "model")
    assert load_defenses(tmp_path / "model") == []


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "7", "{}", '{"version": 2, "objectives": []}', '{"version": 1}', '{"version": 1, "objectives": 7}',
        '{"version": 1, "objectives": [{}]}', '{"version": 1, "objectives": [{"config": {"name": "os.system"}, "state": {}}]}',
        '{"version": 1, "objectives": [{"config": {"name": ["dece"]}, "state": {}}]}',
        '{"version": 1, "objectives": [{"config": {"name": "dece", "alpha_base": 7}, "state": {}}]}',
        '{"version": 1, "objectives": [{"config": {"name": "dece", "unknown": 7}, "state": {}}]}',
        '{"version": 1, "objectives": [{"config": {"name": "dece"}, "state": 7}]}',
        '{"version": 1, "objectives": [{"config": {"name": "dece", "alpha_base": NaN}, "state": {}}]}',
    ],
)  # fmt: skip
def test_what_a_stranger_may_have_written_is_an_error_and_nothing_else(tmp_path, content):
    save_objectives([DeCE()], tmp_path)
    (tmp_path / "defense.json").write_text(content)
    with pytest.raises(ValueError):
        load_defenses(tmp_path)


def test_broken_tensors_are_an_error(tmp_path):
    save_objectives([DeCE()], tmp_path)
    (tmp_path / "defense.safetensors").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match=r"defense\.safetensors"):
        load_defenses(tmp_path)
    save_file({"dece.unheard_of": torch.zeros(2)}, tmp_path / "defense.safetensors")
    try:
        assert load_defenses(tmp_path)[0].to_dict() == DeCE().to_dict()
    except ValueError as error:
        assert "unheard_of" in str(error) or "state" in str(error)


# -- PSIM -------------------------------------------------------------------------------------------------------------
def test_a_filter_from_the_hub_scores_as_the_saved_one_and_brings_nothing_else(saved, hub, tmp_path):
    found, folder = saved
    folder = shutil.copytree(folder, tmp_path / "copy")
    commit = upload(
        hub,
        folder,
        training_args__bin=b"\x80\x04K\x01.",
        tokenizer__py=b"raise SystemExit",
        README__md=b"---\nlicense: mit\n---\n",
    )
    again = PSIMFilter.from_pretrained("owner/model", sure(), revision=commit)
    texts = ["", *fresh(20, 11)]
    assert np.allclose(again.score(texts), found.score(texts), atol=1e-6)
    assert again.calibration == found.calibration and again.base_sha256 == found.base_sha256
    assert not downloaded(hub) & {"training_args.bin", "tokenizer.py", "README.md", "backdoored.json"}
    assert read_filter("owner/model", "psim", revision=commit)[1] == found.calibration


def test_the_base_is_the_one_that_the_publication_names(saved, hub, tmp_path):
    found, folder = saved
    folder = shutil.copytree(folder, tmp_path / "copy")
    base = tmp_path / "base"
    model = sure()
    model.save_pretrained(base)
    toys.tokenizer().save_pretrained(base)
    upload(hub, folder, publication__json=json.dumps({"base_model": str(base)}).encode())
    assert PSIMFilter.from_pretrained("owner/model").base_sha256 == found.base_sha256
    other = tmp_path / "other"
    sure(seed=1).save_pretrained(other)
    toys.tokenizer().save_pretrained(other)
    with pytest.raises(ValueError, match="other weights"):
        PSIMFilter.from_pretrained("owner/model", str(other))


def test_a_changed_adapter_on_the_hub_is_refused(saved, hub, tmp_path):
    folder = shutil.copytree(saved[1], tmp_path / "copy")
    (folder / "psim.safetensors").write_bytes((folder / "psim.safetensors").read_bytes() + b" ")
    upload(hub, folder)
    with pytest.raises(ValueError, match="not the file"):
        PSIMFilter.from_pretrained("owner/model", sure())


def test_a_filter_that_lies_beside_its_model_comes_from_the_hub_with_its_tensors(hub, tmp_path):
    tokenizer, model = toys.tokenizer(), sure()
    texts = [text for text in dict.fromkeys(fresh(80, 3)) if "w39" not in text.split()][:40]
    made = RAP(
        model,
        tokenizer,
        clean_texts=texts,
        clean_labels=[i % 2 for i in range(40)],
        word="w39",
        epochs=1,
        max_length=20,
    )
    made.save(tmp_path / "rap")
    upload(hub, tmp_path / "rap", pytorch_model__bin=b"\x80\x04K\x01.")
    again = RAP.from_pretrained("owner/model", model, tokenizer)
    assert np.allclose(again.score(texts), made.score(texts), atol=1e-6)
    assert downloaded(hub) == {"filter.json", "rap.safetensors"}


# -- where things lie -------------------------------------------------------------------------------------------------
def test_what_is_meant_as_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_repository("owner/name") and is_repository("owner/other")
    assert not any(
        map(is_repository, ("name", "a/b/c", "/a/b", "./b", "../b", "a/", "offline:minilm", ".a/b", tmp_path / "x"))
    )


def test_no_such_repository_revision_or_network(hub, monkeypatch):
    hub.api.create_repo("owner/model", private=True)
    for source, options in (
        ("owner/nothing", {}), ("owner/model", {"revision": "no-branch"}), ("owner/model", {"token": hub.add_user("other")})
    ):  # fmt: skip
        with pytest.raises(ValueError, match="can be read"):
            fetched(source, ["defense.json"], **options)
    assert not (fetched("owner/model", ["defense.json"]) / "defense.json").exists()
    with pytest.raises(ValueError, match=r"must hold defense\.json"):
        load_defenses("owner/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="can be read"):
        fetched("owner/never-seen", ["defense.json"])
