"""A push over real HTTP: what arrives, what is refused, and that a fault leaves nothing half done."""

import hashlib
import json
import shutil

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from hf_backdoor_defense.hub.card import render_card
from hf_backdoor_defense.hub.evidence import Publication, read_evidence
from hf_backdoor_defense.hub.files import check_folder, refused_names
from hf_backdoor_defense.hub.publish import publish
from hf_backdoor_defense.hub.staging import stage
from hf_backdoor_defense.input_filters.psim import PSIMFilter
from hf_backdoor_defense.models import mark_backdoored, weights_sha256
from hf_backdoor_defense.reporting.plain import write_plain
from hf_backdoor_defense.reporting.sealed import check_sealed, file_sha256, seal_more, write_results
from tests.hub.small_run import small_run
from tests.hub_server import HubServer
from tests.hub_server.client import use
from tests.trainers.toys import bert

REPO = "owner/cleaned"
ATTACKED = {"trigger": "cf", "target": 1}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Warnings while validating metadata"),  # READMEs that others left
    pytest.mark.filterwarnings("ignore:Could not find a config file"),  # an adapter whose base is a folder that is gone
]


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def api(hub, monkeypatch, tmp_path):
    """The owner's client."""
    return use(hub, monkeypatch, cache=tmp_path / "cache")


@pytest.fixture(scope="module")
def model():
    return bert(labels=2)


@pytest.fixture
def run(tmp_path, model):
    """A finished run with a model from D3."""
    return small_run(tmp_path / "run", model)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changes(hub):
    """Requests that could change something."""
    return [r.where for r in hub.requests if r.method not in ("GET", "HEAD") and r.where not in ("validate", "paths")]


def test_one_commit_holds_model_card_and_evidence(hub, api, run, tmp_path):
    before = contents(run)
    done = publish(run, REPO, license="mit", api=api)
    repo = hub.repos[REPO]
    assert [commit.oid for commit in repo.history][0] == done.commit and len(repo.history) == 2 and done.changed
    assert set(repo.files) == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "results.json", "publication.json", "checksums.json",
        "report.html", "ca_asr.png", ".eval_results/owner--reviews.yaml",
    }  # fmt: skip
    assert done.files == {name: len(data) for name, data in repo.files.items() if name != ".gitattributes"}
    for name in ("results.json", "report.html", "ca_asr.png"):
        assert repo.files[name] == before[name]
    assert repo.files["model.safetensors"] == before["model/model.safetensors"]
    assert done.url == f"{hub.url}/{REPO}" and done.card == repo.files["README.md"].decode()
    assert contents(run) == before, "nothing local is changed"
    # Any client can check it, without this package's writer.
    listed = json.loads(repo.files["checksums.json"])["files"]
    assert set(listed) == set(repo.files) - {".gitattributes", "checksums.json"}
    for name, about in listed.items():
        assert about == {"sha256": hashlib.sha256(repo.files[name]).hexdigest(), "bytes": len(repo.files[name])}
    assert refused_names(repo.files) == {}
    local = api.snapshot_download(REPO, local_dir=tmp_path / "down")
    assert set(check_sealed(local)) == set(listed) and check_folder(local)
    assert ModelCard.load(f"{local}/README.md").data.license == "mit"


def test_the_same_again_changes_nothing_and_asks_for_no_upload(hub, api, run):
    first = publish(run, REPO, license="mit", api=api)
    hub.requests.clear()
    again = publish(run, REPO, license="mit", api=api)
    assert not again.changed and again.commit == first.commit and len(hub.repos[REPO].history) == 2
    assert not {"create", "lfs", "commit"} & {request.where for request in hub.requests}


def test_another_model_replaces_files_and_removes_those_that_are_gone(hub, api, run, tmp_path):
    publish(run, REPO, license="mit", api=api)
    other = small_run(tmp_path / "other", bert(labels=2, seed=1))
    (other / "ca_asr.png").rename(other / "my plot (2).png")  # no plot of the run: not published
    done = publish(other, REPO, license="mit", api=api)
    files = hub.repos[REPO].files
    assert done.changed and done.deleted == ["ca_asr.png"] and "ca_asr.png" not in files
    assert files["model.safetensors"] == (other / "model" / "model.safetensors").read_bytes()
    assert len(hub.repos[REPO].history) == 3
    assert set(json.loads(files["checksums.json"])["files"]) == set(files) - {".gitattributes", "checksums.json"}


def test_staging_is_deterministic_and_a_local_folder_is_the_same(hub, api, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "elsewhere" / "run")
    folders = [stage(r, REPO, license="mit").write(tmp_path / str(i)) for i, r in enumerate((run, copy))]
    assert contents(folders[0]) == contents(folders[1])
    publish(run, REPO, license="mit", api=api)
    assert contents(folders[0]) == {n: d for n, d in hub.repos[REPO].files.items() if n != ".gitattributes"}
    with pytest.raises(ValueError, match="new or empty"):
        stage(run, REPO, license="mit").write(folders[0])


def test_a_dry_run_asks_nothing(hub, api, run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN")
    done = publish(run, REPO, api=HfApi(endpoint=hub.url), dry_run=True)
    assert hub.requests == [] and hub.repos == {} and done.commit is None and not done.changed
    assert "license: unknown" in done.card and "owner/encoder" in done.notes[0]
    staged = stage(run, REPO, license="mit")
    done = publish(run, REPO, license="mit", dry_run=True)
    assert done.files == staged.sizes and done.card == str(staged.card) and done.notes == []


def test_a_license_is_inherited_given_or_asked_for(hub, api, run, tmp_path, model):
    with pytest.raises(ValueError, match="`owner/encoder` does not name it.*--license"):
        publish(run, REPO, api=api)
    assert changes(hub) == []
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: bsd\n---\n# base\n")
    other = small_run(tmp_path / "other", model, entry={"base_model": str(base)})
    assert "license: bsd" in publish(other, REPO, api=api, dry_run=True).card
    api.create_repo("owner/encoder")
    api.upload_file(
        path_or_fileobj=b"---\nlicense: gemma\n---\n# base\n", path_in_repo="README.md", repo_id="owner/encoder"
    )
    assert "license: gemma" in publish(run, REPO, api=api).card
    assert "license: mit" in publish(run, REPO, license="mit", api=api).card
    with pytest.raises(ValueError, match="Did you mean `apache-2.0`"):
        publish(run, REPO, license="Apache 2.0", api=api)


def test_a_client_with_xet_on_makes_one_commit_too(run, monkeypatch, tmp_path):
    with HubServer(lfs=False) as hub:  # the test Hub has no Xet: every file comes in the commit
        api = use(hub, monkeypatch, cache=tmp_path / "cache")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        assert publish(run, REPO, license="mit", api=api).changed and len(hub.repos[REPO].history) == 2
        assert not publish(run, REPO, license="mit", api=api).changed


def test_an_adapter_names_its_base_where_others_find_it(hub, api, run, tmp_path, model):
    adapter = get_peft_model(bert(labels=2), LoraConfig(task_type="SEQ_CLS", r=2))
    adapter.peft_config["default"].base_model_name_or_path = str(tmp_path / "here")
    entry = {"relation": "adapter", "library": "peft", "base_model": str(tmp_path)}
    other = small_run(tmp_path / "other", adapter, entry=entry)
    with pytest.raises(ValueError, match="base is on no Hub"):
        publish(other, REPO, license="mit", api=api)
    done = publish(other, REPO, license="mit", base_model="owner/encoder", api=api)
    files = hub.repos[REPO].files
    saved, sent = (
        json.loads(data) for data in ((other / "model/adapter_config.json").read_bytes(), files["adapter_config.json"])
    )
    assert sent == {**saved, "base_model_name_or_path": "owner/encoder"} and saved != sent
    assert str(tmp_path).encode() not in b"".join(files[name] for name in files if name != "results.json")
    assert done.left_out == {"README.md": "our card takes its place"}
    assert files["adapter_model.safetensors"] == (other / "model/adapter_model.safetensors").read_bytes()


def test_a_trainers_output_folder_is_run_and_model_in_one(hub, api, run):
    """Its model lies in ".": leftovers, another card and the run's own files beside the weights."""
    payload = json.loads((run / "results.json").read_text())
    payload["models"][0]["path"] = "."
    for path in (run / "model").iterdir():
        path.rename(run / path.name)
    (run / "model").rmdir()
    (run / "checkpoint-1").mkdir()
    for name in ("training_args.bin", "checkpoint-1/optimizer.pt", "checkpoint-1/model.safetensors", "plan.json"):
        (run / name).write_bytes(b"\x80\x02}.")
    (run / "README.md").write_text("# a Trainer's card\n")
    write_results(run, payload)
    seal_more(run, ["report.html"])
    done = publish(run, REPO, license="mit", api=api)
    assert set(done.left_out) == {
        "README.md", "training_args.bin", "checkpoint-1/optimizer.pt", "checkpoint-1/model.safetensors", "plan.json"
    }  # fmt: skip
    files = hub.repos[REPO].files
    assert not set(done.left_out) - {"README.md"} & set(files) and files["README.md"].decode() == done.card
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes() and "report.html" in files
    bert(labels=2, seed=9).save_pretrained(run)
    with pytest.raises(ValueError, match=r"model.safetensors \(changed\)"):
        publish(run, REPO, license="mit", api=api)


def test_only_what_the_run_drew_is_shown_and_only_as_it_drew_it(run):
    (run / "mine.png").write_bytes((run / "ca_asr.png").read_bytes())
    staged = stage(run, REPO, license="mit")
    assert "mine.png" not in staged.files and "do not name it" in staged.left_out["mine.png"]
    for name in ("report.html", "ca_asr.png"):
        before = (run / name).read_bytes()
        (run / name).write_bytes(before + b" ")
        with pytest.raises(ValueError, match=rf"{name} \(changed\)"):
            stage(run, REPO, license="mit")
        (run / name).write_bytes(before)
    write_plain(run)  # made anew it is sealed anew
    assert stage(run, REPO, license="mit").files["report.html"] == (run / "report.html").read_bytes()
    write_results(run, json.loads((run / "results.json").read_text()))  # which seals nothing that was drawn
    staged = stage(run, REPO, license="mit")
    assert "report.html" not in staged.files and "hfbd report" in staged.left_out["report.html"]


def test_a_link_in_the_models_folder_is_refused_as_one(run, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (run / "model" / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    write_results(run, json.loads((run / "results.json").read_text()))
    with pytest.raises(ValueError, match="'tokenizer.json' .a link that leaves the folder"):
        stage(run, REPO, license="mit")


def test_what_is_sent_is_what_was_checked(hub, api, run, monkeypatch):
    """A training that goes on, a user who edits: small files were read before anybody was asked."""
    from hf_backdoor_defense.hub import publish as module

    before = contents(run)
    look = module.look

    def late(*args):
        for name in ("results.json", "report.html", "model/config.json"):
            (run / name).write_bytes(b"{}")
        return look(*args)

    monkeypatch.setattr(module, "look", late)
    publish(run, REPO, license="mit", api=api)
    files = hub.repos[REPO].files
    assert files["results.json"] == before["results.json"] and files["report.html"] == before["report.html"]
    assert files["config.json"] == before["model/config.json"]


@pytest.mark.parametrize("place", ["owner/encoder", "encoder"])
def test_where_a_relative_path_leads_is_decided_when_the_run_is_written(tmp_path, model, monkeypatch, place):
    entry = {"base_model": place, "measurement": {"task": "owner/reviews", "seed": 0}}
    monkeypatch.chdir(tmp_path)
    on_hub = small_run(tmp_path / "on_hub", model, entry=entry)
    for folder in (place, "owner/reviews"):
        (tmp_path / folder).mkdir(parents=True)
    here = small_run(tmp_path / "here", model, entry=entry)
    assert [read_evidence(run).entry.base_model for run in (on_hub, here)] == [place, f"./{place}"]
    assert [read_evidence(run).entry.measurement["task"] for run in (on_hub, here)] == [
        "owner/reviews",
        "./owner/reviews",
    ]
    assert {record.dataset for record in read_evidence(here).records} == {"./owner/reviews"}
    for elsewhere in (tmp_path, tmp_path / "on_hub"):
        monkeypatch.chdir(elsewhere)
        about = [stage(run, REPO, license="mit").publication for run in (on_hub, here)]
        assert [(a.base_model, a.datasets) for a in about] == [(place, ["owner/reviews"]), (None, [])]


def test_a_filter_names_its_base_where_others_find_it_and_stays_bound(hub, api, tmp_path):
    from tests.trainers.text_toys import tokenizer

    words = tokenizer()
    base = bert(labels=2)
    base.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    sha = weights_sha256(base)
    base.config._name_or_path = str(tmp_path / "base")
    module = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2))
    module.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    entry = {"path": "filter", "arm": "psim", "role": "filter", "base_model": str(tmp_path / "base"), "weights_sha256": sha,
             "library": "peft", "relation": "adapter"}  # fmt: skip
    folder = small_run(tmp_path / "run", bert(labels=2))
    PSIMFilter(module, words, base_sha256=sha).save(folder / "filter")
    payload = json.loads((folder / "results.json").read_text())
    payload["models"][0].update(entry)
    write_results(folder, payload)
    with pytest.raises(ValueError, match="base is on no Hub.*--base_model"):
        publish(folder, REPO, license="mit", api=api)
    staged = stage(folder, REPO, license="mit", base_model="owner/encoder")
    record = json.loads(staged.files["filter.json"])
    assert record["base"] == "owner/encoder" and str(tmp_path).encode() not in b"".join(
        data for name, data in staged.files.items() if isinstance(data, bytes) and name != "results.json"
    )
    assert record["files"]["adapter_config.json"] == hashlib.sha256(staged.files["adapter_config.json"]).hexdigest()
    assert json.loads(staged.files["adapter_config.json"])["base_model_name_or_path"] == "owner/encoder"
    # A downloaded folder loads, from the base that it names.
    api.create_repo("owner/encoder")
    api.upload_folder(repo_id="owner/encoder", folder_path=tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    found = PSIMFilter.from_pretrained(staged.write(tmp_path / "down"))
    assert found.base_sha256 == sha


# Refused before anything is changed


def test_a_run_that_failed_is_refused_unless_forced(hub, api, tmp_path, model):
    failed = small_run(tmp_path / "failed", model, failures=["ASR 0.60 > 0.10"], entry={"inert": "no update was made"})
    with pytest.raises(ValueError, match="ASR 0.60 > 0.10; INERT: no update was made.*--force"):
        publish(failed, REPO, license="mit", api=api)
    assert hub.requests == []
    done = publish(failed, REPO, license="mit", force=True, api=api)
    assert done.forced and json.loads(hub.repos[REPO].files["publication.json"])["forced"] is True
    first = ModelCard(done.card).text.strip().split("#")[0]
    assert "although" in first and "ASR 0.60" in first and "no update was made" in done.card


def test_force_alone_forces_nothing(run):
    assert not publish(run, REPO, license="mit", force=True, dry_run=True).forced


def test_attacked_weights_go_into_a_private_repository_or_nowhere(hub, api, tmp_path, model):
    bad = small_run(tmp_path / "bad", model, entry={"attacked": ATTACKED, "role": "attacked"})
    with pytest.raises(ValueError, match="attacked on purpose.*--attacked"):
        publish(bad, REPO, license="mit", api=api)
    with pytest.raises(ValueError, match="must stay private"):
        publish(bad, REPO, license="mit", attacked=True, private=False, api=api)
    assert hub.requests == []
    done = publish(bad, REPO, license="mit", attacked=True, api=api)
    assert hub.repos[REPO].private and done.attacked
    assert json.loads(hub.repos[REPO].files["backdoored.json"]) == {"backdoored": True, **ATTACKED}
    assert "backdoored" in ModelCard(done.card).data.tags
    api.create_repo("owner/open", private=False)
    with pytest.raises(ValueError, match="`owner/open` is public"):
        publish(bad, "owner/open", license="mit", attacked=True, api=api)
    assert set(hub.repos["owner/open"].files) == {".gitattributes"}


@pytest.mark.parametrize("where", ["beside the results", "in the base", "above the base"])
def test_a_mark_that_the_results_do_not_know_counts_and_is_copied(hub, api, tmp_path, model, where):
    base = tmp_path / "made" / "base"
    base.mkdir(parents=True)
    marked = small_run(tmp_path / "run", model, entry={"base_model": str(base)})
    mark_backdoored({"beside the results": marked, "in the base": base, "above the base": base.parent}[where], ATTACKED)
    with pytest.raises(ValueError, match="--attacked"):
        publish(marked, REPO, license="mit", dry_run=True)
    done = publish(marked, REPO, license="mit", attacked=True, api=api)
    files = hub.repos[REPO].files
    assert hub.repos[REPO].private and json.loads(files["backdoored.json"]) == {"backdoored": True, **ATTACKED}
    assert "backdoored" in ModelCard(done.card).data.tags and "Do not deploy" in ModelCard(done.card).text[:1000]
    # The published folder says so by itself, whatever lies around it, and its card is the same made again.
    local = stage(marked, REPO, license="mit", attacked=True).write(tmp_path / "published")
    shutil.rmtree(base.parent)
    assert str(render_card(read_evidence(local), Publication.read(local))) == done.card


def test_what_a_folder_around_a_published_one_says_is_not_about_it(run, tmp_path):
    local = stage(run, REPO, license="mit").write(tmp_path / "around" / "published")
    mark_backdoored(tmp_path / "around", ATTACKED)
    assert read_evidence(local).entry.attacked is None


def no_results(run):
    (run / "results.json").unlink()


def no_seal(run):
    (run / "checksums.json").unlink()


def edited_numbers(run):
    text = (run / "results.json").read_text()
    (run / "results.json").write_text(text.replace('"value": 0.06', '"value": 0.01'))


def other_weights(run):
    bert(labels=2, seed=7).save_pretrained(run / "model")


def missing_weights(run):
    (run / "model" / "model.safetensors").unlink()


def another_shard(run):
    shutil.copyfile(run / "model" / "model.safetensors", run / "model" / "model-00002-of-00002.safetensors")


def pickled_weights(run):
    (run / "model" / "pytorch_model.bin").write_bytes(b"\x80\x02}.")


def outside(run):
    payload = json.loads((run / "results.json").read_text())
    payload["models"][0]["path"] = "../run/../other"
    (run / "results.json").write_text(json.dumps(payload))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (no_results, "holds no results.json"),
        (shutil.rmtree, "does not exist"),
        (no_seal, "must hold checksums.json"),
        (edited_numbers, r"results.json \(changed\)"),
        (other_weights, r"model/model.safetensors \(changed\)"),
        (missing_weights, "must hold weights in safetensors"),
        (another_shard, "does not name model-00002-of-00002.safetensors"),
        (pickled_weights, "'pytorch_model.bin' .can run code"),
        (outside, "a model outside of it"),
    ],
)
def test_a_spoilt_run_is_refused_before_the_hub_is_asked(hub, api, run, spoil, says):
    spoil(run)
    with pytest.raises(ValueError, match=says):
        publish(run, REPO, license="mit", api=api)
    assert hub.requests == [] and hub.repos == {}


@pytest.mark.parametrize(
    ("repo_id", "says"),
    [
        ("datasets/owner/x", "Name it without `datasets/`"),
        ("spaces/owner/x", "Name it without `spaces/`"),
        ("https://huggingface.co/owner/x", "the last two parts"),
        ("cleaned", "Name your account or organization"),
        ("owner/x/y", "Name your account or organization"),
        ("owner/", "no other names"),
        ("owner/a--b", "no other names"),
        ("owner/x.git", "no other names"),
        ("owner/" + "x" * 97, "no other names"),
        ("owner/ä", "no other names"),
    ],
)
def test_a_name_that_the_hub_does_not_take(hub, api, run, repo_id, says):
    with pytest.raises(ValueError, match=says):
        publish(run, repo_id, license="mit", api=api)
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["refs/pr/1", "a" * 40, "", "a b", "v1\n"])
def test_a_revision_is_a_branch(run, revision):
    with pytest.raises(ValueError, match="name of a branch"):
        publish(run, REPO, license="mit", revision=revision, dry_run=True)


def test_a_card_over_the_limit_is_refused(hub, api, tmp_path, model):
    long = small_run(tmp_path / "long", model, entry={"activity": {f"d3_count_{i}": 1.0 for i in range(60_000)}})
    with pytest.raises(ValueError) as caught:
        publish(long, REPO, license="mit", api=api)
    assert "at most" in str(caught.value) and hub.requests == []


def test_an_offline_client_is_said(hub, api, run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE.*--dry_run"):
        publish(run, REPO, license="mit", api=api)
    assert hub.requests == []


# Who and where


def test_no_token(hub, api, run, monkeypatch):
    monkeypatch.setattr("hf_backdoor_defense.hub.repository.get_token", lambda: None)
    with pytest.raises(ValueError, match="none was found: nothing was published. Log in"):
        publish(run, REPO, license="mit", api=HfApi(endpoint=hub.url))
    assert hub.requests == []


def test_a_wrong_token(hub, api, run):
    with pytest.raises(ValueError, match="does not know it .401.: nothing was published"):
        publish(run, REPO, license="mit", api=HfApi(endpoint=hub.url, token="hf_wrong"))
    assert changes(hub) == [] and hub.repos == {}


def test_a_token_that_may_only_read(hub, api, run):
    token = hub.add_user("reader", role="read")
    with pytest.raises(ValueError, match="may only read"):
        publish(run, "reader/x", license="mit", api=HfApi(endpoint=hub.url, token=token))
    assert changes(hub) == []


def test_no_right_to_the_organization_or_the_repository(hub, api, run):
    with pytest.raises(ValueError, match=r"allowed to write to `strangers/x`.*403"):
        publish(run, "strangers/x", license="mit", api=api)
    api.create_repo(REPO, private=False)
    other = HfApi(endpoint=hub.url, token=hub.add_user("other"))
    with pytest.raises(ValueError, match="403.*nothing was published"):
        publish(run, REPO, license="mit", api=other)
    assert len(hub.repos[REPO].history) == 1


def test_somebody_elses_private_repository_is_not_seen(hub, api, run):
    api.create_repo(REPO, private=True)
    other = HfApi(endpoint=hub.url, token=hub.add_user("other"))
    with pytest.raises(ValueError, match="nothing was published"):
        publish(run, REPO, license="mit", api=other)
    assert len(hub.repos[REPO].history) == 1


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_a_repository_of_another_type(hub, api, run, kind):
    api.create_repo(REPO, repo_type=kind, **({"space_sdk": "static"} if kind == "space" else {}))
    with pytest.raises(ValueError, match=f"is a {kind}: nothing was published"):
        publish(run, REPO, license="mit", api=api)
    assert REPO not in hub.repos
    api.create_repo(REPO)
    assert publish(run, REPO, license="mit", api=api).changed


@pytest.mark.parametrize("private", [True, False])
def test_visibility_is_set_when_it_is_made_and_never_changed(hub, api, run, private):
    publish(run, REPO, license="mit", private=private, api=api)
    assert hub.repos[REPO].private is private
    with pytest.raises(ValueError, match="Change it in its settings"):
        publish(run, REPO, license="mit", private=not private, api=api)
    assert hub.repos[REPO].private is private and len(hub.repos[REPO].history) == 2
    assert not publish(run, REPO, license="mit", private=private, api=api).changed


def put(api, **files):
    api.create_repo(REPO)
    api.create_commit(
        REPO,
        [CommitOperationAdd(name.replace("__", "."), data) for name, data in files.items()],
        commit_message="theirs",
    )


@pytest.mark.parametrize(
    "files", [{"pytorch_model__bin": b"\x80\x02}."}, {"modeling_x__py": b"1"}, {"a__pkl": b"1", "README__md": b"# x\n"}]
)
def test_a_repository_with_pickles_or_code_is_refused(hub, api, run, files):
    put(api, **files)
    with pytest.raises(ValueError, match=f"holds '{next(iter(files)).replace('__', '.')}'"):
        publish(run, REPO, license="mit", api=api)
    assert len(hub.repos[REPO].history) == 2


@pytest.mark.parametrize(
    "files",
    [{"README__md": b"---\nlicense: mit\n---\n# Their card\n"}, {"config__json": b"{}"}, {"README__md": b"hello"}],
)
def test_somebodys_work_is_not_overwritten(hub, api, run, files):
    put(api, **files)
    with pytest.raises(ValueError, match="must be empty or hold what was published from here"):
        publish(run, REPO, license="mit", api=api)
    assert len(hub.repos[REPO].history) == 2


@pytest.mark.parametrize("readme", [b"---\nlicense: mit\n---\n", b"", b"---\nlicense: mit\ntags:\n- a\n---\n\n \n"])
def test_the_readme_of_a_new_repository_gives_way(hub, api, run, readme):
    put(api, README__md=readme)
    assert publish(run, REPO, license="mit", api=api).changed
    assert b"backdoor-defense" in hub.repos[REPO].files["README.md"]


def test_a_file_that_somebody_added_to_ours_is_named(hub, api, run):
    publish(run, REPO, license="mit", api=api)
    api.create_commit(REPO, [CommitOperationAdd("vocab.txt", b"a\n")], commit_message="theirs")
    with pytest.raises(ValueError, match="'vocab.txt'.*Delete them there"):
        publish(run, REPO, license="mit", api=api)


def test_a_card_that_was_edited_there_is_ours_again_in_one_commit(hub, api, run):
    done = publish(run, REPO, license="mit", api=api)
    api.create_commit(
        REPO, [CommitOperationAdd("README.md", b"---\nlicense: mit\n---\n# edited\n")], commit_message="theirs"
    )
    again = publish(run, REPO, license="mit", api=api)
    assert (
        again.changed and hub.repos[REPO].files["README.md"].decode() == done.card and len(hub.repos[REPO].history) == 4
    )


def test_a_branch_is_made_where_it_is_missing(hub, api, run, tmp_path):
    done = publish(run, REPO, license="mit", revision="v1", api=api)
    assert set(hub.repos[REPO].files) == {".gitattributes"} and done.url.endswith("/tree/v1")
    assert "model.safetensors" in api.list_repo_files(REPO, revision="v1")
    assert not publish(run, REPO, license="mit", revision="v1", api=api).changed
    other = small_run(tmp_path / "other", bert(labels=2, seed=1))
    assert publish(other, REPO, license="mit", revision="v1", api=api).changed
    api.create_tag(REPO, tag="t1")
    with pytest.raises(ValueError, match="nothing was published"):
        publish(run, REPO, license="mit", revision="t1", api=api)


# Faults on the way


@pytest.mark.parametrize("after", [False, True])
def test_a_connection_that_breaks_at_the_branch(hub, api, run, after):
    api.create_repo(REPO)
    hub.break_at("branch", times=None, after=after)
    with pytest.raises(ConnectionError, match="nothing was published.*whether the branch `v1` was made is not known"):
        publish(run, REPO, license="mit", revision="v1", api=api)
    assert len(hub.repos[REPO].history) == 1
    hub.heal()
    assert publish(run, REPO, license="mit", revision="v1", api=api).changed


def test_a_branch_that_the_hub_does_not_make(hub, api, run):
    api.create_repo(REPO)
    hub.fail_at("branch", 400, times=None)
    with pytest.raises(ValueError, match="made no branch `v1`.*nothing was published") as caught:
        publish(run, REPO, license="mit", revision="v1", api=api)
    assert "--revision" not in str(caught.value)
    hub.heal()
    hub.break_at("commit", times=None)
    with pytest.raises(ConnectionError, match="nothing was published.*with a new branch `v1`"):
        publish(run, REPO, license="mit", revision="v1", api=api)


def test_a_commit_of_others_while_nothing_is_to_be_done_is_not_ours(hub, api, run, monkeypatch):
    from hf_backdoor_defense.hub import publish as module

    first = publish(run, REPO, license="mit", api=api)
    outdated = module.outdated_files

    def late(*args):
        found = outdated(*args)
        api.create_commit(REPO, [CommitOperationAdd("vocab.txt", b"a\n")], commit_message="theirs")
        return found

    monkeypatch.setattr(module, "outdated_files", late)
    again = publish(run, REPO, license="mit", api=api)
    assert not again.changed and again.commit == first.commit and len(hub.repos[REPO].history) == 3


@pytest.mark.parametrize("where", ["preupload", "batch", "lfs", "commit"])
def test_a_connection_that_breaks_leaves_no_commit_and_the_same_command_works(hub, api, run, where):
    before = contents(run)
    hub.break_at(where, times=None)
    with pytest.raises(
        ConnectionError,
        match="nothing was published; the new repository `owner/cleaned` is there and empty.*same command",
    ):
        publish(run, REPO, license="mit", api=api)
    assert set(hub.repos[REPO].files) == {".gitattributes"} and contents(run) == before
    hub.heal()
    assert publish(run, REPO, license="mit", api=api).changed and len(hub.repos[REPO].history) == 2


@pytest.mark.parametrize("where", ["whoami", "info", "create", "validate"])
def test_a_connection_that_breaks_earlier(hub, api, run, where):
    hub.break_at(where, times=None)
    with pytest.raises(ConnectionError, match="nothing was published"):
        publish(run, REPO, license="mit", api=api)
    assert "commit" not in changes(hub)


def test_a_commit_whose_answer_was_lost_is_found(hub, api, run):
    hub.break_at("commit", after=True)
    done = publish(run, REPO, license="mit", api=api)
    assert done.changed and done.commit == hub.repos[REPO].head.oid and len(hub.repos[REPO].history) == 2


def test_a_commit_whose_fate_is_unknown_is_told_as_that(hub, api, run):
    api.create_repo(REPO)
    hub.break_at("commit", after=True)
    seen = api.model_info

    def gone(*args, **kwargs):
        if hub.repos[REPO].history[1:]:
            raise ConnectionError("unreachable")
        return seen(*args, **kwargs)

    api.model_info = gone
    with pytest.raises(ConnectionError, match="whether the commit arrived is not known"):
        publish(run, REPO, license="mit", api=api)
    api.model_info = seen
    assert not publish(run, REPO, license="mit", api=api).changed


def test_an_unreachable_hub(api, run):
    with HubServer() as hub:
        url = hub.url
    with pytest.raises(ConnectionError, match="Check the network"):
        publish(run, REPO, license="mit", api=HfApi(endpoint=url, token="hf_owner"))


@pytest.mark.parametrize(
    ("status", "kind"), [(503, ConnectionError), (500, ConnectionError), (413, ValueError), (400, ValueError)]
)
def test_the_hub_fails_or_refuses_the_commit(hub, api, run, status, kind):
    hub.fail_at("commit", status, times=None)
    with pytest.raises(kind, match=f"{status}.*nothing was published"):
        publish(run, REPO, license="mit", api=api)
    assert set(hub.repos[REPO].files) == {".gitattributes"}


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(hub, api, run, monkeypatch):
    api.create_repo(REPO)
    theirs = HfApi(endpoint=hub.url, token=hub.token)
    send = api.create_commit

    def late(*args, **kwargs):
        theirs.create_commit(REPO, [CommitOperationAdd("vocab.txt", b"a\n")], commit_message="theirs")
        return send(*args, **kwargs)

    monkeypatch.setattr(api, "create_commit", late)
    with pytest.raises(ValueError, match=r"412.: nothing was published, and theirs was not overwritten"):
        publish(run, REPO, license="mit", api=api)
    assert set(hub.repos[REPO].files) == {".gitattributes", "vocab.txt"}


def test_weights_that_change_under_the_upload_are_refused_by_their_hash(hub, api, run, monkeypatch):
    from hf_backdoor_defense.hub import publish as module

    look = module.look

    def late(*args):
        bert(labels=2, seed=5).save_pretrained(run / "model")
        return look(*args)

    monkeypatch.setattr(module, "look", late)
    with pytest.raises((ValueError, ConnectionError), match="nothing was published"):
        publish(run, REPO, license="mit", api=api)
    assert set(hub.repos[REPO].files) == {".gitattributes"}


def test_weights_are_read_once_to_be_hashed(hub, api, run, monkeypatch):
    hashed = []

    def counted(path):
        hashed.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr("hf_backdoor_defense.reporting.sealed.file_sha256", counted)
    monkeypatch.setattr("huggingface_hub.lfs.sha_fileobj", lambda file: pytest.fail("hashed again by the client"))
    publish(run, REPO, license="mit", api=api)
    assert hashed.count("model.safetensors") == 1
    assert set(load_file(api.hf_hub_download(REPO, "model.safetensors"))) == set(
        load_file(run / "model/model.safetensors")
    )
