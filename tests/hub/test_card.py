import ast
import dataclasses
import json
import re
import socket
import time
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from hf_backdoor_defense import registry
from hf_backdoor_defense.hub.card import CARD_LIMIT, eval_files, eval_results, render_card
from hf_backdoor_defense.hub.card_text import PROJECT
from hf_backdoor_defense.hub.evidence import read_evidence
from hf_backdoor_defense.hub.figures import COST, number
from hf_backdoor_defense.hub.markdown import code, command_lines, plain
from hf_backdoor_defense.hub.methods import METHODS
from hf_backdoor_defense.hub.usage import AUTO_CLASSES
from tests.hub.cases import ATTACKED, ROLES, counted, evidence_of, publication_of, record, records_of
from tests.hub.small_run import small_run
from tests.hub_server.metadata import check_card

ROOT = Path(__file__).parents[2]
each_role = pytest.mark.parametrize("role", ROLES)

HOSTILE = [
    "a | b || c",
    "`code` ``` ~~~",
    "<script>alert(1)</script><img src=x onerror=y>",
    "x\n\n# heading\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
    "x\r\n---\r\nlicense: mit\r\n---\r\n",
    "# heading",
    "1. item",
    "- item",
    "+ item",
    "> quote",
    "=== ",
    "[link](https://evil.example) ![i](http://evil.example/x.png) <https://evil.example>",
    "https://evil.example www.evil.example me@evil.example",
    "**bold** __bold__ _em_ *em* ~~gone~~",
    "\\| \\` \\\\",
    "{{ 7 * 7 }} {% raw %} {# x #}",
    "&lt;b&gt; &#60;b&#62; &amp;",
    "\u202eright to left\u2066\u200b\u2028\u2029\x00\x1b[31m\x85",
    "$$x$$ \\(y\\)",
    "[ref]: https://evil.example",
    "",
    "word",
]


def content(role="purified", **entry):
    return str(render_card(evidence_of(role, **entry), publication_of(role)))


def tables(text):
    """Rows of cells of every table, cut at bars without a backslash: another way than the renderer's."""
    found, last = [], ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not last.startswith("|"):
                found.append([])
            if not set(line) <= set("|-"):
                found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        last = line
    return found


# -- metadata


@each_role
def test_results_of_the_metadata_survive_the_round_trip(role, tmp_path):
    evidence, publication = evidence_of(role), publication_of(role)
    render_card(evidence, publication).save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.eval_results == eval_results(evidence, publication)
    own = {
        r
        for r in evidence.records
        if r.defense == evidence.entry.arm and r.metric not in COST and r.setting != "before"
    }
    assert sorted(r.metric_value for r in loaded.data.eval_results) == sorted(r.value for r in own)
    assert {r.metric_args.get("low") for r in loaded.data.eval_results} == {r.low for r in own}


def test_values_equal_the_file_of_results(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    run = small_run(tmp_path / "run", BertForSequenceClassification(config))
    results = eval_results(read_evidence(run), publication_of())
    written = [r for r in json.loads((run / "results.json").read_text())["records"] if r["defense"] == "d3"]
    types = {
        "accuracy": "ca",
        "attack_success_rate": "asr",
        "recovered_accuracy": "r_acc",
        "defense_effectiveness_rate": "der",
    }
    assert {types[r.metric_type]: r.metric_value for r in results} == {
        r["metric"]: r["value"] for r in written if r["metric"] != "seconds"
    }
    assert {types[r.metric_type]: r.metric_args.get("n") for r in results} == {
        r["metric"]: r["n"] for r in written if r["metric"] != "seconds"
    }


def test_awkward_floats_survive(tmp_path):
    values = [1 / 3, 1e-17, 5e-324, 0.1 + 0.2, 1e22, 123456789.123456789, 0.0, 1.0]
    for value in values:
        evidence = evidence_of("cleaned", records=[record("recipe", "loss", value)])
        render_card(evidence, publication_of("cleaned")).save(tmp_path / "README.md")
        assert ModelCard.load(tmp_path / "README.md").data.eval_results[0].metric_value == value


def test_metadata_of_a_purified_model():
    data = render_card(evidence_of("purified"), publication_of()).data
    assert (data.base_model, data.base_model_relation) == ("owner/encoder", "finetune")
    assert (data.license, data.datasets, data.language) == ("apache-2.0", ["owner/reviews"], ["en"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert data.tags == ["backdoor-defense", "d3", "generated_from_trainer"]
    assert data.metrics[:2] == ["accuracy", "attack_success_rate"] and data.model_name == "made-clean"


def test_an_adapter_says_so_and_an_unknown_base_is_left_out():
    data = render_card(evidence_of("filter"), publication_of("filter")).data
    assert (data.library_name, data.base_model_relation) == ("peft", "adapter")
    without = render_card(
        evidence_of("purified", base_model="/data/me/theirs"), publication_of(base_model=None, datasets=[])
    )
    assert "base_model" not in without.data.to_dict() and "base_model_relation" not in without.data.to_dict()
    assert "/data/me" not in str(without) and "datasets" not in without.data.to_dict()


@each_role
@pytest.mark.parametrize("license_id", ["mit", "other"])
def test_an_independent_check_of_the_metadata_finds_nothing(role, license_id):
    card = render_card(evidence_of(role), publication_of(role, license=license_id))
    assert check_card(str(card)) == ([], [])


@each_role
def test_what_is_shown_is_what_is_saved_and_rendered_again(role, tmp_path, monkeypatch):
    evidence, publication = evidence_of(role), publication_of(role)
    first = render_card(evidence, publication)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(socket, "socket", None)  # no network
    assert str(render_card(evidence, publication)) == str(first) == first.content
    assert eval_files(evidence, publication) == eval_files(evidence, publication)


# -- text


@each_role
def test_every_number_of_the_tables_is_a_record_to_the_shown_digits(role):
    evidence = evidence_of(role)
    figures = tables(content(role))[0]
    metrics = {"CA": "ca", "ASR": "asr", "R-Acc": "r_acc", "DER": "der", "FRR": "frr", "coverage": "coverage", "AASR": "aasr",
               "loss": "loss", "norm ratio": "norm_ratio", "dose": "dose"}  # fmt: skip
    arms = {
        "before": "undefended",
        "no defense": "undefended",
        "**this model**": evidence.entry.arm,
        "never poisoned": "clean_reference",
    }
    shown = 0
    for label, *cells in figures[1:]:
        arm = next(arm for start, arm in arms.items() if label.startswith(start))
        setting = ("before" if label.startswith("before") else "after") if role == "cleaned" else ""
        arm = evidence.entry.arm if role == "cleaned" else arm
        for title, cell in zip(figures[0][1:], cells, strict=True):
            metric = "ftr" if (arm, title) == ("clean_reference", "ASR") else metrics[title]
            found = [r for r in evidence.records if (r.defense, r.metric, r.setting) == (arm, metric, setting)]
            if cell == "not measured":
                assert not found
                continue
            numbers = [float(text.replace("−", "-")) for text in re.findall(r"−?[\d.]+", cell)]
            expected = [found[0].value] + ([] if found[0].low is None else [found[0].low, found[0].high])
            assert len(numbers) == len(expected)
            assert all(abs(a - b) <= 0.0005 + 1e-12 for a, b in zip(numbers, expected, strict=True))
            shown += 1
    quality = [r for r in records_of(role) if r.metric not in COST]
    assert shown == len(quality)


@each_role
def test_every_role_has_its_chapters_in_order(role):
    text = render_card(evidence_of(role), publication_of(role)).text
    chapters = re.findall(r"^## (.*)$", text, re.M)
    first = "What was done to it" if role == "attacked" else "The threat, and what was simulated"
    assert chapters == [first, "Figures", "Cost", "What the method did", "Limits", "How to use it", "How to verify it",
                        "How to reproduce it", "Citation"]  # fmt: skip
    assert "hfbd verify me/made-clean" in text and "None" not in text and "\n\n\n" not in text


def test_the_first_line_of_an_attacked_model_warns():
    card = render_card(evidence_of("attacked"), publication_of("attacked"))
    first = card.text.strip().splitlines()[0]
    assert (
        first.startswith("**These weights were backdoored on purpose (attack: por;")
        and "cf, mn" in first
        and "Do not deploy" in first
    )
    assert "backdoored" in card.data.tags and "generated_from_trainer" in card.data.tags


@pytest.mark.parametrize("role", ["fine_tuned", "purified", "cleaned", "filter"])
def test_the_mark_of_attacked_weights_stays_after_a_treatment(role):
    card = render_card(evidence_of(role, attacked=ATTACKED), publication_of(role))
    first = card.text.strip().splitlines()[0]
    assert (
        first.startswith("**") and "on purpose" in first and "Do not deploy" in first and "backdoored" in card.data.tags
    )
    assert (
        "on purpose" not in content(role)
        and "backdoored" not in render_card(evidence_of(role), publication_of(role)).data.tags
    )


def test_a_base_that_was_attacked_is_told_from_poisoned_data():
    lines = [
        render_card(evidence_of("fine_tuned", attacked=mark), publication_of("fine_tuned")).text.strip().splitlines()[0]
        for mark in (ATTACKED, {**ATTACKED, "cleaned": {"method": "fine_tuning"}})
    ]
    assert "trained on data that was poisoned on purpose" in lines[0]
    assert "from a model that was backdoored on purpose" in lines[1] and "data" not in lines[1].partition("(")[0]


def test_a_forced_card_says_first_what_failed():
    evidence = evidence_of(
        "purified", payload={"failures": ["INERT: d3: nothing moved.", "gate: 1 < 2"]}, inert="nothing moved"
    )
    text = render_card(evidence, publication_of(forced=True)).text.strip()
    assert text.startswith(
        "**Published although its own run reports a problem:**\n\n- INERT: d3: nothing moved.\n- gate: 1 < 2".replace(
            "<", "\\<"
        )
    )
    assert text.index("INERT: d3") < text.index("# made-clean") and "**INERT: nothing moved**" in text


@pytest.mark.parametrize(
    ("role", "words"),
    [
        (
            "fine_tuned",
            ["With few classes DeCE keeps", "no other backdoor"],
        ),
        ("cleaned", ["Nothing was measured about triggers", "hfbd eval"]),
        ("purified", ["does not mean healed", "simulated"]),
        ("filter", ["cannot see a backdoor that sits in the victim's own adapter", "false rejection rate"]),
        ("attacked", ["nothing about another"]),
    ],
)
def test_limits_are_said_per_role(role, words):
    limits = content(role).partition("## Limits")[2].partition("## ")[0]
    assert all(word in limits for word in words) and "Fewer than three seeds" in limits


def test_limits_follow_what_was_measured():
    alone = content("purified", records=[counted("d3", "ca", 280)], controls=[])
    assert "Nothing was measured about triggers" in alone and "No control was run beside it" in alone
    assert "any attack. No figure here is about triggers" in alone
    three = [dataclasses.replace(r, seed=seed) for r in records_of("purified") for seed in (1, 2, 3)]
    assert "Fewer than three seeds" not in content("purified", records=three) and "the run has 3 seeds" in content(
        "purified", records=three
    )
    floorless = [r for r in records_of("purified") if r.metric != "ftr"]
    assert "floor of ASR is not known" in content("purified", records=floorless)
    assert "floor of ASR is not known" not in content("purified")


def test_nothing_measured_is_said_and_not_left_blank():
    text = content(
        "purified", records=[], controls=[], activity={}, labels=[], data={}, payload={"command": [], "verdict": ""}
    )
    assert "Nothing was measured." in text and "## Cost\n\nNot measured." in text and "gives no account" in text
    assert "no command that repeats it" in text and "What the run concluded" not in text
    assert render_card(evidence_of("purified", records=[]), publication_of()).data.eval_results is None


def test_a_control_is_no_defense_and_plain_training_has_no_method_tag():
    assert "No defense: fine-pruning, to compare with." in content(
        "purified", arm="fine_pruning", method={"name": "fine_pruning"}
    )
    plain_run = render_card(evidence_of("fine_tuned", arm="undefended", method={}), publication_of("fine_tuned"))
    assert (
        plain_run.data.tags == ["backdoor-defense", "generated_from_trainer"]
        and "No defense: plain training." in plain_run.text
    )
    assert "load_defenses" not in plain_run.text


def test_a_setting_of_an_entry_is_the_one_that_counts():
    both = [counted("undefended", "ca", 300, setting="release"), counted("undefended", "ca", 100, setting="lora")]
    text = content(
        "attacked", arm="poisoned_base", recorded_as="undefended", setting="release", records=both, controls=[]
    )
    assert [row[1] for row in tables(text)[0][1:]] == [
        f"{number(both[0].value)} [{number(both[0].low)}, {number(both[0].high)}]"
    ]


def test_a_trigger_that_another_method_planted_is_told_from_the_method():
    mark = {"attack": "badnets", "trigger": {"name": "badnets", "words": ["cf"]}, "target": 1}
    card = render_card(
        evidence_of("attacked", attacked=mark, method={"name": "weight_poisoning"}), publication_of("attacked")
    )
    first = card.text.strip().splitlines()[0]
    assert "weight_poisoning" in card.data.tags and "plain weight poisoning" in card.text
    assert "attack: badnets; trigger: badnets (words cf), for the class good)" in first and "{" not in first
    victim = render_card(evidence_of("attacked", attacked=mark, method={}, data={}), publication_of("attacked"))
    assert (
        "trigger: badnets (words cf), for the class good)" in victim.text
        and "does not know" not in victim.text
        and "without a defense" not in victim.text
    )


def test_objectives_that_were_hosted_together_are_all_named():
    method = {
        "name": "dece",
        "alpha_base": 0.985,
        "together with": [{"name": "trajectory", "min_rise": 3.0}, {"name": "mine"}],
    }
    card = render_card(evidence_of("fine_tuned", arm="dece+trajectory", method=method), publication_of("fine_tuned"))
    assert card.data.tags[1:4] == ["dece", "trajectory", "mine"] and "@misc{dece," in card.text
    assert "together with the trajectory filter, which drops" in card.text and "together with `mine`" in card.text
    assert "clean-label attack leaves no contradiction" in card.text
    assert "`dece`, `alpha_base=0.985`; `trajectory`, `min_rise=3.0`; `mine`." in card.text


def test_an_objective_of_the_users_own_is_not_called_a_control():
    text = content("fine_tuned", method={"name": "mine"})
    assert (
        "Defended against: what its author says." in text and "`mine`, which is an objective that this package" in text
    )


def test_a_control_without_a_floor_is_not_called_one():
    text = content("attacked", records=[record("attacked", "loss", 4.0), record("clean_reference", "loss", 3.5)])
    assert "| never poisoned | 3.500 |" in text and "95 %" not in text and "over rows" not in text


@pytest.mark.parametrize(
    ("role", "name", "shown"),
    [
        ("filter", "runs/me/input.jsonl", {"false_rejection_rate": "held-out clean texts", "coverage": "scored texts"}),
        ("filter", "offline:docstrings", dict.fromkeys(("false_rejection_rate", "coverage"), "offline:docstrings")),
        ("cleaned", "theirs/rows", {"loss": "texts of the publisher's own"}),
        ("cleaned", "rows.txt", {"loss": "texts of the publisher's own"}),
        ("cleaned", "C:\\me\\rows", {"loss": "texts of the publisher's own"}),
        ("cleaned", "owner/name:config", {"loss": "owner/name:config"}),
        ("cleaned", "imdb", {"loss": "imdb"}),
    ],
)
def test_the_metadata_name_data_sets_and_no_paths(role, name, shown):
    records = [dataclasses.replace(r, dataset=name) for r in records_of(role)]
    found = eval_results(evidence_of(role, records=records), publication_of(role))
    assert shown.items() <= {r.metric_type: r.dataset_type for r in found}.items()
    assert all(r.dataset_type == r.dataset_name for r in found)


def test_the_first_paragraph_says_what_came_out():
    purified = content("purified").partition("## ")[0]
    assert (
        "Measured: attack success 0.050 (before 0.982, never poisoned 0.047), clean accuracy 0.834 (before 0.861,"
        in purified
    )
    assert "attack success 0.050 (without a defense 0.982, " in content("fine_tuned")
    unmeasured = {"records": [], "payload": {"verdict": "Nothing came. It stopped."}}
    assert "What its run says: Nothing came." in content("purified", **unmeasured).partition("## ")[0]
    assert "What its run says" not in content("purified", records=[], payload={"verdict": ""})


def test_only_a_low_attack_success_may_look_like_a_cure():
    for count, said in ((17, True), (168, True), (169, False), (331, False)):
        records = [counted("d3", "asr", count), counted("undefended", "asr", 335)]
        assert ("does not mean healed" in content("purified", records=records)) == said


def test_without_a_method_nothing_is_said_of_one():
    text = content("fine_tuned", arm="undefended", method={}, activity={}, payload={"models": [{}, {}]})
    assert "What the method did" not in text and "who knows the method" not in text
    assert "What the whole run concluded, of all its models:" in text and "What the run concluded:" in content(
        "purified"
    )
    marked = content("fine_tuned", arm="undefended", method={}, activity={}, attacked={"trigger": "cf", "target": 1})
    assert "(trigger: cf, for the class good), with plain training. Do not deploy them: nothing was done" in marked


def test_a_warm_up_comes_before_the_loss_before():
    cold, warm = content("cleaned"), content("cleaned", data={"warm-up": "a head"})
    assert (
        "| before: the model as it was given | 4.125" in cold
        and "| before: the model after its warm-up | 4.125" in warm
    )
    assert "warm-up" not in cold


@pytest.mark.parametrize("recorded", [True, False])
def test_the_time_of_a_cleaning_is_a_cost(recorded):
    records = records_of("cleaned") + [record("recipe", "seconds", 12.34, setting="after")] * recorded
    text = content("cleaned", records=records, payload={} if recorded else {"training": {"seconds": 12.34}})
    assert tables(text)[1] == [["", "seconds of training"], ["**this model** (recipe)", "12.3"]]


def test_a_filter_names_its_base_and_what_its_seconds_were_for():
    records = [*records_of("filter")[:2], record("psim", "seconds", 2.0, n=50)]
    on_hub = render_card(
        evidence_of("filter", weights_sha256="0123456789abcdef", records=records), publication_of("filter")
    )
    assert (
        "SHA-256 `0123456789ab…`" in on_hub.text and 'base = "owner/encoder"  # SHA-256 0123456789ab…\n' in on_hub.text
    )
    assert "seconds to score 50 inputs" in on_hub.text
    local = render_card(evidence_of("filter", base_model="runs/x"), publication_of("filter", base_model=None))
    assert "it is not on the Hub" in local.text and "runs/x" not in local.text


@pytest.mark.parametrize(
    ("words", "cut", "files"),
    [(["--seed", "3"], False, False), (["--clean", "rows.csv"], False, True), (["--clean", "/data/me/rows.csv"], True, True),
     (["--model_name", "owner/encoder"], False, False), (["--output_dir", "runs/again"], False, False)],
)  # fmt: skip
def test_a_command_says_what_is_cut_and_what_is_missing(words, cut, files):
    text = content("purified", payload={"command": ["hfbd", "clean", *words]})
    assert ("Paths of one machine are cut" in text) == cut and ("are the publisher's, and not" in text) == files


def test_built_in_data_is_explained_where_it_occurs():
    said = "is built in: scikit-learn's scans"
    assert said in content("purified", data={"clean rows": "offline:digits: 300 images"}) and said not in content(
        "purified"
    )
    assert said not in content("purified", data={"model": "offline:digits-vit"})


# -- hostile text


def shape(markdown_it, text):
    """What a Markdown parser makes of a card: its blocks and links, without their words."""
    parser = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    found = []
    for token in parser.parse(text):
        inside = [t.type for t in token.children or [] if t.type not in ("text", "softbreak", "code_inline")]
        links = [t.attrs.get("href") for t in token.children or [] if t.type == "link_open"]
        found.append((token.type, inside, links))
    return found


VERSIONS = ("torch", "commit", "machine", "hf_backdoor_defense")
PLACES = {
    "label": lambda t: {"labels": [t, "good"]},
    "data": lambda t: {"data": {"measured on": t, "trigger": t}},
    "data key": lambda t: {"data": {t or "x": "value"}},
    "activity": lambda t: {"activity": {t: 1.0}},
    "inert": lambda t: {"inert": t or "x"},
    "verdict": lambda t: {"payload": {"verdict": t or "x"}},
    "failure": lambda t: {"payload": {"failures": [t or "x"]}},
    "command": lambda t: {"payload": {"command": ["hfbd", "clean", "--method", t, t]}},
    "method": lambda t: {"method": {"name": "d3", "x": t}},
    "dataset": lambda t: {"records": [counted("d3", "ca", 200, dataset=t or "x")]},
    "attack": lambda t: {"records": [counted("d3", "asr", 9, attack=t or "x")]},
    "arm": lambda t: {"arm": t or "x", "method": {"name": "d3"}, "records": [counted(t or "x", "ca", 200)]},
    "control": lambda t: {"controls": [t or "x"], "records": [counted(t or "x", "ca", 200), counted("d3", "ca", 200)]},
    "own method": lambda t: {"method": {"name": t or "x"}},
    "mark": lambda t: {"attacked": {"attack": t or "x", "trigger": t or "x", "target": 1}},
    "base": lambda t: {"base_model": "offline:" + t},
    "environment": lambda t: {"records": [counted("d3", "ca", 200, env={**dict.fromkeys(VERSIONS, t or "x"), "cpus": 2})]},
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_hostile_text_changes_no_structure(place):
    markdown_it = pytest.importorskip("markdown_it", reason="an independent Markdown parser")
    publication = publication_of(base_model=None)
    calm = shape(markdown_it, render_card(evidence_of("purified", **PLACES[place]("word")), publication).text)
    for text in HOSTILE:
        card = render_card(evidence_of("purified", **PLACES[place](text)), publication)
        assert shape(markdown_it, card.text) == calm, text
        assert all(len(row) == len(rows[0]) for rows in tables(card.text) for row in rows), (
            text
        )  # a parser drops cells too many
        assert check_card(str(card))[0] == []
        assert not any(hidden in str(card) for hidden in "\u202e\u2066\u200b\u2028\x00\x1b")


@pytest.mark.parametrize("text", [text for text in HOSTILE if text and "\x00" not in text])
def test_escaped_text_reads_as_it_was(text):
    markdown_it = pytest.importorskip("markdown_it", reason="an independent Markdown parser")
    parser = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for escaped, before in ((plain(text, starts=True), ""), ("x " + plain(text), "x "), (code(text), "")):
        inline = [t for token in parser.parse(escaped) for t in token.children or []]
        assert "".join(t.content for t in inline).strip() == before + " ".join(text.split())
        assert {t.type for t in inline} <= {"text", "code_inline", "text_special"}


def test_a_command_keeps_its_words():
    import shlex

    words = ["hfbd", "clean", "--clean", "it's a|b `c`.csv", "--x", "", "--y", "-1"]
    assert shlex.split(command_lines(words).replace("\\\n", "")) == words


# -- files for the Hub's results


def test_eval_files_hold_the_same_values_for_data_sets_of_the_hub():
    evidence, publication = evidence_of("purified"), publication_of()
    [(path, data)] = eval_files(evidence, publication).items()
    assert path == ".eval_results/owner--reviews.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(data))
    results = [r for r in eval_results(evidence, publication) if r.metric_type != "defense_effectiveness_rate"]
    assert [(e.dataset_id, e.task_id, e.value) for e in entries] == [
        ("owner/reviews", r.metric_type, r.metric_value) for r in results
    ]


@pytest.mark.parametrize("name", ["offline:digits", "/data/reviews", "reviews.jsonl"])
def test_eval_files_leave_out_what_is_not_on_the_hub(name):
    evidence = evidence_of("purified", records=[counted("d3", "ca", 200, dataset=name)])
    assert eval_files(evidence, publication_of()) == {}
    assert "/data/" not in str(render_card(evidence, publication_of()))


# -- errors


@pytest.mark.parametrize(
    ("publication", "entry", "words"),
    [
        ({"repo_id": "no-owner"}, {}, ["`repo_id`", "ORG/NAME"]),
        ({"repo_id": "a/b/c"}, {}, ["`repo_id`"]),
        ({"repo_id": "a/b--c"}, {}, ["`repo_id`"]),
        ({"license": "apache"}, {}, ["`license`", "apache-2.0", "repositories-licenses"]),
        ({"base_model": "./theirs"}, {}, ["`base_model`", "'./theirs'"]),
        ({"base_model": "offline:minilm"}, {}, ["`base_model`"]),
        ({"datasets": ["offline:digits"]}, {}, ["`datasets`", "'offline:digits'"]),
        ({"language": ["English"]}, {}, ["`language`", "en"]),
        ({}, {"pipeline_tag": "text-classifcation"}, ["`pipeline_tag`", "Did you mean `text-classification`?"]),
        ({}, {"pipeline_tag": "quux"}, ["`pipeline_tag`", "Known here"]),
        ({}, {"activity": {"x": float("nan")}}, ["`activity`", "'x'", "Run again"]),
        ({}, {"activity": {f"name-{i}-{'x' * 60}": 1.0 for i in range(20_000)}}, [f"at most {CARD_LIMIT} bytes", "Shorten"]),
    ],
)  # fmt: skip
def test_what_the_hub_would_refuse_is_an_error(publication, entry, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        render_card(evidence_of("purified", **entry), publication_of(**publication))
    assert all(word in str(error.value) for word in words)


# -- what the card knows without a run


def test_every_method_of_the_registry_is_known():
    names = [
        name
        for table in (
            "DEFENSES",
            "COMPARATORS",
            "CONTROLS",
            "PRETRAINING",
            "PURIFIERS",
            "GENERATIVE",
            "DETECTORS",
            "ATTACKS",
            "FILTERS",
        )
        for name in getattr(registry, table)
    ]
    assert set(names) <= set(METHODS) and set(METHODS) - set(names) == {"pretraining", "fine_tuning"}


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.paper])
def test_papers_say_no_more_than_the_documentation(name):
    documented = re.sub(
        r"\s+", " ", (ROOT / "docs" / "papers.md").read_text().partition(f"## `{name}`")[2].partition("\n## ")[0]
    )
    paper = METHODS[name].paper
    authors = [a for a in paper.authors.split(" and ") if a and a != "others"]
    for fact in (f"*{paper.title}*", paper.venue.replace(", ", " "), paper.arxiv, paper.doi, paper.year, *authors):
        assert fact in documented, fact
    assert paper.bibtex(name).count("{") == paper.bibtex(name).count("}")


def test_the_projects_citation_is_that_of_its_file():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["title"] == cff["title"] and PROJECT["note"] == cff["license"]
    assert PROJECT["author"] == "{" + cff["authors"][0]["name"] + "}"


@each_role
@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_the_code_of_a_card_is_python_with_names_that_exist(role, library):
    import importlib

    block = re.search(r"```python\n(.*?)```", content(role, library=library), re.S)[1]
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module != "peft":
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("tag", AUTO_CLASSES)
def test_every_task_has_a_class(tag):
    import transformers

    head = AUTO_CLASSES[tag]
    assert hasattr(transformers, f"AutoModel{'For' if head else ''}{head}")


def test_a_card_of_a_large_run_takes_less_than_a_second():
    render_card(evidence_of("purified"), publication_of())  # imports and the template
    arms = [f"arm-{i}" for i in range(100)]
    records = [
        *records_of("purified"),
        *(counted(arm, m, 100, seed=s) for arm in arms for m in ("ca", "asr") for s in (1, 2, 3)),
    ]
    evidence = evidence_of("purified", records=records, controls=arms, labels=[f"class {i}" for i in range(1000)])
    start = time.process_time()
    card = render_card(evidence, publication_of())
    assert time.process_time() - start < 1.0
    assert len(tables(str(card))[0]) == 102 and "and 980 more" in str(card)
