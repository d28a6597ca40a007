"""Verification: what is published passes, every kind of forgery is caught by the check that is for it, nothing hostile runs."""

import json
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from hf_backdoor_defense import __version__
from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.evaluation.metrics import wilson
from hf_backdoor_defense.hub.card import CARD_LIMIT
from hf_backdoor_defense.hub.load import load_defenses
from hf_backdoor_defense.hub.publish import publish
from hf_backdoor_defense.hub.verify import CHECKS, FAIL, PASS, SKIPPED, UNKNOWN, verify
from hf_backdoor_defense.models import mark_backdoored
from hf_backdoor_defense.pretrained import saved_sha256
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.experiment.tiny import WORDS
from tests.hub.published import edit, forge, seal, write_texts
from tests.hub_server import HubServer
from tests.hub_server.client import use
from tests.trainers.toys import PadCollator, arguments, bert, classification_rows


def outcomes(found):
    return {check.name: check.outcome for check in found.checks}


def text(found, name):
    return next(check.text for check in found.checks if check.name == name)


def figure(results, metric, arm="d3"):
    return next(r for r in results["records"] if r["metric"] == metric and r["defense"] == arm)


# -- what is right ----------------------------------------------------------------------------------------------------
def test_what_was_published_passes_and_the_figures_are_the_very_same(made):
    found = verify(made.folder, task=str(made.test))
    assert outcomes(found) == dict.fromkeys(CHECKS, PASS) and found.exit_code == 0
    own = {r["metric"]: r for r in json.loads((made.run / "results.json").read_text())["records"]
           if r["defense"] == "d3"}  # fmt: skip
    assert [f.metric for f in found.figures] == ["ca", "asr", "r_acc"]
    for agreement in found.figures:
        recorded, measured = own[agreement.metric], agreement.measured
        assert (measured.value, measured.n) == (recorded["value"], recorded["n"]) and agreement.low is None
    assert "the very rows" in text(found, "figures") and "any other trigger" in found.sentence
    assert found.trigger == "badnets (words cf, count 1), for the class class 1" == found.to_dict()["trigger"]
    assert found.trigger in text(found, "figures") and found.trigger in found.sentence
    assert json.loads(json.dumps(found.to_dict()))["exit_code"] == 0


def test_without_the_rows_the_figures_are_a_claim_and_it_says_so(made):
    found = verify(made.folder)
    assert outcomes(found)["figures"] == UNKNOWN and found.exit_code == 2
    assert "--task" in text(found, "figures") and "publisher's claim" in found.sentence
    quick = verify(made.folder, files_only=True)
    assert (outcomes(quick)["weights"], outcomes(quick)["figures"], quick.exit_code) == (SKIPPED, SKIPPED, 0)
    assert "publisher's claim" in quick.sentence and "weights" not in quick.sentence


def test_other_rows_of_the_task_are_compared_within_their_intervals(made, tmp_path):
    other = write_texts(tmp_path / "other.jsonl", 90, 400)
    found = verify(made.folder, task=str(other), all_rows=True)
    assert found.exit_code == 0 and "not known to be" in text(found, "figures")
    assert all(f.low is not None and f.measured.n in (90, 60) for f in found.figures)
    swapped = tmp_path / "swapped.jsonl"  # a task that this model has not learned
    rows = [json.loads(line) for line in other.read_text().splitlines()]
    swapped.write_text("".join(json.dumps({**row, "label": (row["label"] + 1) % 3}) + "\n" for row in rows))
    found = verify(made.folder, task=str(swapped), all_rows=True)
    assert outcomes(found)["figures"] == FAIL and found.exit_code == 1 and "ca" in text(found, "figures")
    assert "Do not rely" in found.sentence


@pytest.mark.parametrize("rows", [None, '{"text": "a1"}', '{"text": "a1", "label": 9}', '{"text": "", "label": 1}', ""])
def test_rows_that_cannot_be_measured_on_say_nothing_about_the_model(made, tmp_path, rows):
    place = tmp_path / "rows.jsonl"
    if rows is not None:
        place.write_text(rows + "\n")
    found = verify(made.folder, task=str(place), all_rows=True)
    assert outcomes(found)["figures"] == UNKNOWN and found.exit_code == 2


# -- forgeries --------------------------------------------------------------------------------------------------------
def test_edited_figures_fail_the_checksums_and_the_card(made, tmp_path):
    folder = made.copy(tmp_path / "m")
    edit(folder, lambda results: figure(results, "asr").update(vars(wilson(0, 60))))
    found = verify(folder, files_only=True)
    assert outcomes(found)["checksums"] == FAIL and "results.json" in text(found, "checksums")
    assert outcomes(found)["card"] == FAIL and "other figures" in text(found, "card") and found.exit_code == 1
    seal(folder)
    assert outcomes(verify(folder, files_only=True))["card"] == FAIL


def test_an_edited_card_fails_and_the_line_is_named(made, tmp_path):
    folder = made.copy(tmp_path / "m")
    card = folder / "README.md"
    card.write_text(card.read_text().rstrip() + "\n\nAll backdoors are gone.\n")
    seal(folder)
    found = verify(folder, files_only=True)
    assert outcomes(found)["card"] == FAIL and "line" in text(found, "card")
    assert outcomes(found)["checksums"] == PASS


def test_a_consistent_forgery_passes_everything_but_the_measurement(made, tmp_path):
    folder = made.copy(tmp_path / "m")
    forge(folder, lambda results: figure(results, "ca").update(vars(wilson(90, 90))))
    found = verify(folder, files_only=True)
    assert found.exit_code == 0 and "publisher's claim" in found.sentence
    found = verify(folder, task=str(made.test))
    assert outcomes(found)["figures"] == FAIL and "differs" in found.text()
    # Without the digest of the rows the intervals decide.
    forge(folder, lambda results: figure(results, "asr").update(vars(wilson(0, 60))))
    forge(folder, lambda results: results["models"][0]["measurement"].pop("rows_sha256"))
    found = verify(folder, task=str(made.test))
    assert {f.metric: f.outcome for f in found.figures}["asr"] == "worse" and found.exit_code == 1


def test_exchanged_weights_are_noticed_whoever_seals_them(made, tmp_path):
    folder = made.copy(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):  # another class for each
        tensors[name] = tensors[name].roll(1, 0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert outcomes(verify(folder))["checksums"] == FAIL
    seal(folder)
    found = verify(folder, task=str(made.test))
    assert outcomes(found)["weights"] == FAIL and outcomes(found)["figures"] == SKIPPED
    forge(folder, lambda results: results["models"][0].update(weights_sha256=saved_sha256(folder)))
    found = verify(folder, task=str(made.test))
    assert outcomes(found)["weights"] == PASS and outcomes(found)["figures"] == FAIL


def test_files_beyond_the_checksums_and_missing_ones_fail(made, tmp_path):
    folder = made.copy(tmp_path / "m")
    (folder / "vocab.txt").write_text("[PAD]\n")
    (folder / "training.json").unlink()
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")  # the Hub's own
    found = verify(folder, files_only=True)
    said = text(found, "checksums")
    assert "'vocab.txt' (not in it)" in said and "'training.json' (missing)" in said and "gitattributes" not in said


@pytest.mark.parametrize(
    ("name", "content"),
    [("pytorch_model.bin", b"\x80\x04K\x01."), ("modeling.py", b"raise SystemExit"), ("vocab.txt", b"\x80\x04K\x01.")],
)
def test_pickles_and_code_in_a_folder_stop_it_before_anything_is_loaded(made, tmp_path, name, content):
    folder = made.copy(tmp_path / "m")
    (folder / name).write_bytes(content)
    seal(folder)
    found = verify(folder, task=str(made.test))
    assert outcomes(found) == {"files": FAIL, **dict.fromkeys(CHECKS[1:], SKIPPED)}
    assert name in text(found, "files")


@pytest.mark.parametrize(
    "change",
    [
        lambda page: page.replace("default-src 'none'", "default-src *", 1),
        lambda page: "<script>alert(1)</script>" + page,
        lambda page: page.replace(
            "<body>", '<body><META\nHTTP-EQUIV="refresh" content="0; url=https://example.org">', 1
        ),
        lambda page: page.encode("utf-16").decode("latin-1"),
    ],
)
def test_a_report_that_could_run_something_in_a_browser_is_refused(made, tmp_path, change):
    folder = made.copy(tmp_path / "m")
    page = (folder / "report.html").read_text()
    assert "<body>" in page
    (folder / "report.html").write_text(change(page))
    seal(folder)
    found = verify(folder, files_only=True)
    assert outcomes(found)["files"] == FAIL and "do not open it" in text(found, "files")


def test_a_link_out_of_the_folder_is_refused(made, tmp_path):
    folder = made.copy(tmp_path / "m")
    (tmp_path / "secret.json").write_text("{}")
    (folder / "training.json").unlink()
    (folder / "training.json").symlink_to(tmp_path / "secret.json")
    assert outcomes(verify(folder))["files"] == FAIL


# -- what must not get through ----------------------------------------------------------------------------------------
def test_an_attacked_model_never_passes(made, tmp_path):
    folder = made.copy(tmp_path / "m")
    mark_backdoored(folder, {"attack": "badnets"})
    seal(folder)
    found = verify(folder, files_only=True, allow_forced=True)
    assert outcomes(found)["report"] == FAIL and found.exit_code == 1 and "attacked on purpose" in text(found, "report")
    assert outcomes(found)["card"] == FAIL  # it does not warn
    folder = made.copy(tmp_path / "n")
    forge(folder, lambda results: results["models"][0].update(attacked={"attack": "badnets"}))
    found = verify(folder, files_only=True, allow_forced=True)
    assert outcomes(found) == {
        **dict.fromkeys(CHECKS[:4], PASS),
        "report": FAIL,
        "weights": SKIPPED,
        "figures": SKIPPED,
    }
    assert found.sentence.startswith("Not to be let through") and "exit code 1 is as it should be" in found.sentence


def test_a_failed_report_passes_only_where_that_is_allowed(made, tmp_path):
    folder = made.copy(tmp_path / "m")
    forge(folder, lambda results: results["failures"].append("GATE: too much"))
    found = verify(folder, files_only=True)
    assert outcomes(found)["report"] == FAIL and "GATE: too much" in text(found, "report")
    found = verify(folder, files_only=True, allow_forced=True)
    assert outcomes(found)["report"] == PASS and "GATE: too much" in text(found, "report") and found.exit_code == 0


# -- which trigger, which rows, which version --------------------------------------------------------------------------
def about(results):
    return results["models"][0]["measurement"]


def test_another_trigger_than_is_named_fails_and_the_measured_one_is_on_the_card(made, tmp_path):
    folder, word = made.copy(tmp_path / "m"), WORDS[2][19]
    forge(folder, lambda results: about(results).update(trigger={"name": "badnets", "words": [word], "count": 1}))
    found = verify(folder, task=str(made.test))
    assert (
        outcomes(found)["figures"] == FAIL and "words cf" in text(found, "figures") and word in text(found, "figures")
    )
    assert (
        f"words {word}" in (folder / "README.md").read_text() and "words cf" not in (folder / "README.md").read_text()
    )
    # Where the results name it throughout, whoever reads what was verified reads the name.
    forge(folder, lambda results: results["models"][0]["data"].pop("trigger"))
    forge(folder, lambda results: about(results).pop("rows_sha256"))
    shown = verify(folder, task=str(made.test)).text()
    assert f"words {word}" in shown and "words cf" not in shown
    for target in (0, 99, None, "1"):
        folder = made.copy(tmp_path / f"target-{target}")
        edit(folder, lambda results, target=target: about(results).update(target=target))
        seal(folder)
        assert verify(folder, task=str(made.test)).exit_code == 1


@pytest.mark.parametrize("change", [{"limit": 6}, {"eval_rows": 3}, {"limit": 3, "eval_rows": 3}])
def test_the_publisher_takes_no_rows_from_those_of_the_caller(made, tmp_path, change):
    folder, other = made.copy(tmp_path / "m"), write_texts(tmp_path / "other.jsonl", 90, 400)
    forge(folder, lambda results: about(results).update(change))
    for rows in (other, made.test):
        found = verify(folder, task=str(rows))
        assert [f.measured.n for f in found.figures] == [90, 60, 60] and found.exit_code == 0, found.text()
    # The caller may.
    found = verify(folder, task=str(other), options={"limit": 75})
    assert [f.measured.n for f in found.figures] == [75, 50, 50] and found.exit_code == 0, found.text()


def test_too_few_rows_cannot_tell(made, tmp_path):
    found = verify(made.folder, task=str(write_texts(tmp_path / "few.jsonl", 48, 400)))
    assert outcomes(found)["figures"] == UNKNOWN and "48 rows" in text(found, "figures") and found.exit_code == 2
    folder = made.copy(tmp_path / "m")
    forge(folder, lambda results: about(results).update(held_out=0.1))
    found = verify(folder, task=str(made.test))
    assert outcomes(found)["figures"] == UNKNOWN and "too few" in text(found, "figures")
    assert verify(folder, task=str(made.test), all_rows=True).exit_code == 0


@pytest.mark.parametrize("metric", ["ca", "asr", "r_acc"])
@pytest.mark.parametrize("arm", ["d3", "undefended"])
def test_an_interval_that_its_figure_does_not_give_fails(made, tmp_path, metric, arm):
    folder = made.copy(tmp_path / "m")
    forge(folder, lambda results: figure(results, metric, arm).update(low=figure(results, metric, arm)["value"]))
    found = verify(folder, files_only=True)
    value = figure(json.loads((folder / "results.json").read_text()), metric, arm)["value"]
    if value == 0:  # its interval begins there
        assert outcomes(found)["card"] == PASS
        forge(folder, lambda results: figure(results, metric, arm).update(high=1e-6))
        found = verify(folder, files_only=True)
    assert outcomes(found)["card"] == FAIL and f"`{metric}` of {arm}" in text(found, "card") and found.exit_code == 1


def test_what_another_version_worded_cannot_be_told(made, tmp_path):
    def by(version):
        return lambda results: [record["env"].update(hf_backdoor_defense=version) for record in results["records"]]

    def reword(folder, name, old, new):
        path = folder / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
        seal(folder)

    folder = made.copy(tmp_path / "m")
    forge(folder, by("0.0.7"))
    assert verify(folder, files_only=True).exit_code == 0  # that it is another says nothing
    reword(folder, "README.md", "## ", "## On ")
    found = verify(folder, task=str(made.test))
    assert outcomes(found) == {**dict.fromkeys(CHECKS, PASS), "card": UNKNOWN} and found.exit_code == 2
    assert "'0.0.7'" in text(found, "card") and __version__ in text(found, "card")
    assert "card's words could not be checked" in found.sentence
    reword(folder, "report.html", "default-src 'none'", "default-src *")
    found = verify(folder, files_only=True)
    assert outcomes(found)["files"] == UNKNOWN and "'0.0.7'" in text(found, "files") and found.exit_code == 2
    # Other figures in the card are wrong in any version, and other words in this one.
    folder = made.copy(tmp_path / "n")
    forge(folder, by("0.0.7"))
    value = figure(json.loads((folder / "results.json").read_text()), "ca")["value"]
    reword(folder, "README.md", f"value: {value}", "value: 0.9999")
    assert outcomes(verify(folder, files_only=True))["card"] == FAIL
    folder = made.copy(tmp_path / "o")
    reword(folder, "README.md", "## ", "## On ")
    assert outcomes(verify(folder, files_only=True))["card"] == FAIL


def test_a_card_that_is_too_long_is_not_read(made, tmp_path):
    folder = made.copy(tmp_path / "m")
    (folder / "README.md").write_text("---\na: [" + "[" * CARD_LIMIT + "\n---\n")
    seal(folder)
    found = verify(folder, files_only=True)
    assert outcomes(found)["card"] == FAIL and str(CARD_LIMIT) in text(found, "card")


# -- hostile contents -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change",
    [
        lambda results: results.update(records="none"),
        lambda results: results.update(records=[[]]),
        lambda results: results.update(models=7),
        lambda results: results.update(models=[{"path": 1}]),
        lambda results: results["models"][0].update(role=["purified"]),
        lambda results: results["models"][0].update(weights_sha256=10**400),
        lambda results: figure(results, "ca").update(value=float("nan")),
        lambda results: figure(results, "ca").update(n=10**400),
        lambda results: figure(results, "ca").update(n=True),
        lambda results: results["models"][0].update(measurement=[1]),
        lambda results: results["models"][0]["measurement"].update(batch_size=10**9),
        lambda results: results["models"][0]["measurement"].update(trigger={"name": "badnets", "count": 10**9}),
        lambda results: results["models"][0]["measurement"].update(trigger={"name": "insent", "sentence": "a " * 9999}),
        lambda results: results["models"][0]["measurement"].update(target="1", max_length="8"),
        lambda results: results["models"][0]["measurement"].update(target=99),
        lambda results: results["models"][0]["measurement"].update(reader="pickle"),
    ],
)
def test_results_that_no_run_writes_never_pass(made, tmp_path, change):
    folder = made.copy(tmp_path / "m")
    edit(folder, change)
    seal(folder)
    found = verify(folder, task=str(made.test))
    assert found.exit_code in (1, 2) and len(found.checks) == len(CHECKS)
    try:
        forge(folder, lambda results: None)
    except Exception:  # no card can be made of it at all, and the card's check fails
        assert outcomes(found)["card"] in (FAIL, SKIPPED)
    else:
        assert verify(folder, task=str(made.test)).exit_code in (1, 2)


@pytest.mark.parametrize("name", ["results.json", "publication.json", "checksums.json", "config.json", "README.md"])
@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"[" * 50_000, b"\xff\xfe", b'{"schema": 1}'])
def test_broken_files_fail_and_never_crash(made, tmp_path, name, content):
    folder = made.copy(tmp_path / "m")
    (folder / name).write_bytes(content)
    if name != "checksums.json":
        seal(folder)
    assert verify(folder, task=str(made.test)).exit_code == 1


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 10**9},
        {"num_hidden_layers": 10**9},
        {"hidden_size": 4800},
        {"architectures": ["pipeline"]},
        {"architectures": ["AutoModel"]},
        {"architectures": ["Trainer"]},
        {"architectures": None},
        {"model_type": "nothing"},
        {"auto_map": {"AutoModel": "modeling.Evil"}},
        {"vision_config": {"auto_map": {"AutoModel": "modeling.Evil"}}},
        {"_attn_implementation": "owner/kernel"},
        {"text_config": {"attn_implementation": {"": "sdpa", "x": "owner/kernel@main"}}},
        {"experts_implementation": "owner/kernel"},
        {"num_labels": 3_000_000},
        {"text_config": {"encoder_layers": 100_000}},
        {"text_config": [{"vocab_size": 10**9}]},
    ],
)
def test_a_configuration_that_would_take_memory_or_run_code_is_refused(made, tmp_path, change):
    folder = made.copy(tmp_path / "m")
    edit(folder, lambda config: config.update(change), name="config.json")
    seal(folder)
    found = verify(folder)
    assert FAIL in (outcomes(found)["weights"], outcomes(found)["files"]) and found.exit_code == 1


def test_what_strangers_wrote_is_printed_without_commands_for_the_terminal(made, tmp_path):
    folder = made.copy(tmp_path / "m")
    forge(folder, lambda results: results["failures"].append("\x1b[2J\u202ecool\x9b1m"))
    shown = verify(folder, files_only=True).text()
    assert not any(mark in shown for mark in ("\x1b", "\u202e", "\x9b")) and "U+001B" in shown


# -- from the Hub -----------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        server.api = use(server, monkeypatch, cache=tmp_path / "cache")
        yield server


def downloads(hub):
    return [request.path for request in hub.requests if "/resolve/" in request.path]


def test_a_round_trip_over_the_hub_at_a_revision(made, hub, tmp_path):
    first = publish(made.run, "owner/model", license="mit", api=hub.api)
    found = verify("owner/model", task=str(made.test), api=hub.api, keep=tmp_path / "kept")
    assert found.exit_code == 0 and found.commit == first.commit
    model = BertForSequenceClassification.from_pretrained(tmp_path / "kept")
    assert saved_sha256(tmp_path / "kept") == saved_sha256(made.folder) and model.config.num_labels == 3
    for path in made.folder.rglob("*"):
        if path.is_file():
            assert (tmp_path / "kept" / path.relative_to(made.folder)).read_bytes() == path.read_bytes()
    # Somebody with write access edits the card: main fails, the commit that was published still passes.
    hub.api.upload_file(
        path_or_fileobj=(made.folder / "README.md").read_bytes() + b"\nBetter than ever.\n", path_in_repo="README.md",
        repo_id="owner/model",
    )  # fmt: skip
    assert outcomes(verify("owner/model", files_only=True, api=hub.api))["checksums"] == FAIL
    assert verify("owner/model", revision=first.commit, files_only=True, api=hub.api).exit_code == 0
    with pytest.raises(ValueError, match="must be new or empty"):
        verify("owner/model", api=hub.api, keep=tmp_path / "kept")


def test_what_a_hosted_trainer_pushed_passes_as_far_as_it_was_measured(hub, tmp_path):
    host = DefendedTrainer(
        bert(), args=arguments(tmp_path / "out", hub_model_id="owner/model"), train_dataset=classification_rows(),
        data_collator=PadCollator(), defense=DeCE(alpha_base=0.7),
    )  # fmt: skip
    host.train()
    host.push_to_hub(license="mit")
    found = verify("owner/model", api=hub.api)
    assert outcomes(found) == {**dict.fromkeys(CHECKS, PASS), "figures": UNKNOWN}, found.text()
    assert found.exit_code == 2 and verify("owner/model", api=hub.api, files_only=True).exit_code == 0
    assert load_defenses("owner/model", revision=found.commit)[0].alpha_base == 0.7


def test_of_a_repository_with_a_pickle_nothing_is_downloaded(made, hub):
    publish(made.run, "owner/model", license="mit", api=hub.api)
    for name in ("pytorch_model.bin", "nested/tool.py"):
        hub.api.upload_file(path_or_fileobj=b"\x80\x04K\x01.", path_in_repo=name, repo_id="owner/model")
    before = len(downloads(hub))
    found = verify("owner/model", task=str(made.test), api=hub.api)
    assert found.exit_code == 1 and "pytorch_model.bin" in text(found, "files") and "tool.py" in text(found, "files")
    assert len(downloads(hub)) == before and "nothing was downloaded" in text(found, "files")


def test_nothing_is_kept_of_a_download_whose_files_do_not_pass(made, hub, tmp_path):
    publish(made.run, "owner/model", license="mit", api=hub.api)
    hub.api.upload_file(path_or_fileobj=b"\x80\x04K\x01.", path_in_repo="vocab.txt", repo_id="owner/model")
    found = verify("owner/model", api=hub.api, keep=tmp_path / "kept")
    assert (
        outcomes(found)["files"] == FAIL and "was removed" in text(found, "files") and not (tmp_path / "kept").exists()
    )


def test_a_repository_over_the_limit_is_not_downloaded(made, hub):
    publish(made.run, "owner/model", license="mit", api=hub.api)
    before = len(downloads(hub))
    found = verify("owner/model", api=hub.api, max_gb=1e-6)
    assert found.exit_code == 2 and "--max_gb" in text(found, "files") and len(downloads(hub)) == before
    assert found.sentence == "Nothing was verified."


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("../model.safetensors", 10),
        ("/etc/passwd", 10),
        ("a\x1b[2J.json", 10),
        ("config.json", None),
        ("vocab.txt", 10**12),
    ],
)
def test_names_and_sizes_that_a_hostile_server_gives_are_refused(name, size):
    files = [SimpleNamespace(rfilename=name, size=size), SimpleNamespace(rfilename="model.safetensors", size=10)]
    api = SimpleNamespace(
        model_info=lambda *args, **kwargs: SimpleNamespace(sha="0" * 40, siblings=files),
        token=None,
        endpoint="http://127.0.0.1:9",
    )
    found = verify("owner/model", api=api)
    assert found.exit_code == 1 and "nothing was downloaded" in text(found, "files") and "\x1b" not in found.text()


def test_what_is_not_there_or_not_to_be_seen_is_an_error(made, hub, tmp_path):
    publish(made.run, "owner/hidden", license="mit", private=True, api=hub.api)
    stranger = HfApi(endpoint=hub.url, token=hub.add_user("stranger"))
    for source, revision, api in (
        ("owner/nothing", None, hub.api),
        ("owner/hidden", "no-branch", hub.api),
        ("owner/hidden", None, stranger),
    ):
        with pytest.raises(ValueError, match="must be a model"):
            verify(source, revision=revision, api=api)
    with pytest.raises(ConnectionError):
        verify("owner/hidden", api=HfApi(endpoint="http://127.0.0.1:9", token="hf_x"))
    with pytest.raises(ValueError, match="published folder or ORG/NAME"):
        verify(tmp_path / "none")
    with pytest.raises(ValueError, match="for a repository"):
        verify(made.folder, revision="main")
    assert verify("owner/hidden", api=hub.api, files_only=True).exit_code == 0


def test_a_run_folder_is_no_publication(made, tmp_path):
    found = verify(shutil.copytree(made.run / "model", tmp_path / "m"))
    assert found.exit_code == 1 and outcomes(found)["report"] == FAIL and "publication.json" in text(found, "report")
