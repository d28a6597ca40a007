"""What may be published, and read from a download."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from hf_backdoor_defense.hub.files import check_contents, check_folder, publishable, refused_names

ALLOWED = (
    "model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json adapter_model.safetensors "
    "adapter_config.json config.json generation_config.json tokenizer.json tokenizer_config.json "
    "special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt bpe.codes spiece.model "
    "tokenizer.model source.spm sentencepiece.bpe.model chat_template.jinja "
    "additional_chat_templates/tool_use.jinja preprocessor_config.json processor_config.json defense.json "
    "defense.safetensors filter.json psim.safetensors rap.safetensors training.json backdoored.json warm_up.json"
).split()
EVIDENCE = (
    "README.md results.json publication.json checksums.json report.html ca_asr.png LICENSE .eval_results/owner--reviews.yaml"
).split()
REFUSED = (
    "pytorch_model.bin pytorch_model-00001-of-00002.bin pytorch_model.bin.index.json adapter_model.bin model.pt "
    "model.PTH weights.pkl weights.ckpt tf_model.h5 flax_model.msgpack head.joblib arrays.npy arrays.npz model.onnx "
    "rng_state.pth training_args.bin modeling_mine.py run.sh helper.so notebook.ipynb model.zip ../config.json "
    "/config.json a/../../config.json a\\config.json .git/config .env notes.docx model/model.safetensors "
    "config.json.bak model.safetensors.py .eval_results/run.py .eval_results.yaml xmodel.safetensors config.jsonx"
).split()


@pytest.mark.parametrize("name", [*ALLOWED, *EVIDENCE, ".gitattributes"])
def test_what_a_published_model_holds_is_read(name):
    assert refused_names([name]) == {}


@pytest.mark.parametrize("name", [*REFUSED, "", "config.json\n", "conf\x1big.json", " config.json"])
def test_anything_else_is_refused_with_a_reason(name):
    assert list(refused_names(["config.json", name])) == [name]
    assert refused_names([name])[name]


def model(folder, **files):
    """A folder with tiny weights, a configuration, and `files` (bytes by name, `__` for a dot)."""
    folder.mkdir(exist_ok=True)
    save_file({"w": np.zeros((2, 3), dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_a_trainers_leftovers_are_left_out_and_named(tmp_path):
    folder = model(
        tmp_path / "m",
        training_args__bin=b"\x80\x02",
        optimizer__pt=b"PK\x03\x04",
        README__md=b"# peft\n",
        notes__docx=b"",
    )
    for name in (
        "checkpoint-3/optimizer.pt",
        "checkpoint-3/model.safetensors",
        "runs/a/events.out.tfevents.1",
        ".DS_Store",
        "rng_state_0.pth",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x80\x02")
    found = publishable(folder)
    assert found.files == ["config.json", "model.safetensors"]
    assert set(found.left_out) == {
        "training_args.bin", "optimizer.pt", "README.md", "notes.docx", "checkpoint-3/optimizer.pt",
        "checkpoint-3/model.safetensors", "runs/a/events.out.tfevents.1", ".DS_Store", "rng_state_0.pth",
    }  # fmt: skip
    check_contents(folder, found.files)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.pkl", "tf_model.h5", "x.msgpack", "modeling_x.py", "old/a.ckpt"]
)
def test_weights_that_can_run_code_stop_it_and_are_named(tmp_path, name):
    folder = model(tmp_path / "m")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name}.*save_pretrained"):
        publishable(folder)


def test_a_folder_without_weights_is_refused(tmp_path):
    folder = model(tmp_path / "m", defense__safetensors=b"")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="must hold weights in safetensors"):
        publishable(folder)
    (folder / "filter.json").write_text("{}")
    assert "filter.json" in publishable(folder).files  # a rule needs none
    with pytest.raises(ValueError, match="is no folder"):
        publishable(tmp_path / "nothing")


def test_links_must_not_leave_the_folder(tmp_path):
    folder = model(tmp_path / "m")
    (tmp_path / "secret.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ValueError, match="'tokenizer.json' .a link that leaves the folder"):
        publishable(folder)
    with pytest.raises(ValueError, match="a link that leaves the folder"):
        check_folder(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").symlink_to(folder / "config.json")
    assert "vocab.json" in publishable(folder).files
    (tmp_path / "elsewhere").mkdir()
    (folder / "loop").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="'loop'"):
        publishable(folder)


def pickled():
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, buffer)
    return buffer.getvalue()


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"x")
    return buffer.getvalue()


class Called:
    """Calls something when it is loaded."""

    def __reduce__(self):
        return print, ("called",)


def test_words_that_only_look_like_the_old_pickles_are_words(tmp_path):
    for name, content in {
        "vocab.txt": b"cat\ndog\nRabbit\n(\nt\n", "merges.txt": b"#version: 0.2\nt h\n", "tokenizer.model": b"IQ== 0\nIg== 1\n",
        "spiece.model": b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "NOTICE": b".\n", "LICENSE": b"",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    check_contents(tmp_path, [path.name for path in tmp_path.iterdir()])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model.safetensors", pickled(), "no safetensors"),
        ("model.safetensors", b"", "no safetensors"),
        ("model.safetensors", b"\xff" * 64, "no safetensors"),
        ("config.json", b"\x80\x04}\x94.", "begins like a pickle"),
        ("spiece.model", b"\x80\x02}.", "begins like a pickle"),
        ("spiece.model", pickle.dumps(print, 0)[:-1] + b"(tR.", "a pickle in plain letters"),
        ("x.spm", b"cbuiltins\nprint\n(S'x'\ntRand so on", "a pickle in plain letters"),
        ("vocab.txt", b"(S'x'\nibuiltins\nprint\n.", "a pickle in plain letters"),
        ("merges.txt", pickle.dumps(Called(), 1), "a pickle in plain letters"),
        ("vocab.txt", pickle.dumps(Called(), 0), "a pickle in plain letters"),
        ("tokenizer.model", zipped(), "zip"),
        ("vocab.txt", b"\x7fELF\x02", "a program"),
        ("vocab.txt", b"\xff\xfe", "no text"),
        ("config.json", b"{", "no JSON"),
        ("config.json", b"[" * 100_000, "no JSON"),
        ("config.json", json.dumps({"auto_map": {"AutoModel": "mine.Model"}}).encode(), "auto_map"),
        ("tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["m.T", None]}}).encode(), "auto_map"),
        ("config.json", json.dumps({"a": [{"auto_map": {"AutoModel": "mine.Model"}}]}).encode(), "auto_map"),
        ("config.json", json.dumps({"attn_implementation": "owner/kernel"}).encode(), "names a kernel"),
        ("config.json", json.dumps({"text": {"_experts_implementation": {"": "o/k:f"}}}).encode(), "names a kernel"),
        ("config.json", json.dumps({"custom_pipelines": {"x": {"impl": "m.P"}}}).encode(), "custom_pipelines"),
        ("adapter_config.json", json.dumps({"auto_mapping": {"parent_library": "os.path"}}).encode(), "imports 'os.path'"),
        ("adapter_config.json", json.dumps({"auto_mapping": {"parent_library": "transformersx.a"}}).encode(), "imports"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"w": "../x.safetensors"}}).encode(), "not there"),
        ("model.safetensors.index.json", b"[]", "no index"),
        ("ca_asr.png", b"<svg/>", "no PNG"),
    ],
)  # fmt: skip
def test_content_must_be_what_the_name_says(tmp_path, name, content, reason):
    folder = model(tmp_path / "m")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        check_folder(folder)
    assert repr(name) in str(caught.value)


def test_all_faults_are_named_at_once_and_escaped(tmp_path):
    folder = model(tmp_path / "m", config__json=b"{", vocab__txt=b"\xff")
    with pytest.raises(ValueError, match="'config.json'.*'vocab.txt'"):
        check_folder(folder)
    (folder / "a\x1b[2Jb.bin").write_bytes(b"")
    with pytest.raises(ValueError) as caught:
        check_folder(folder)
    assert "\x1b" not in str(caught.value)


def test_what_transformers_and_peft_write_passes(tmp_path):
    folder = model(
        tmp_path / "m",
        adapter_config__json=json.dumps({"auto_mapping": {"parent_library": "transformers.models.bert.modeling_bert"}}).encode(),
        generation_config__json=b"{}",
        chat_template__jinja="{{ messages }} é".encode(),
        vocab__txt=b"",
        spiece__model=b"\x0a\x0e\xff",
        tokenizer__json="{\"a\": \"é\"}".encode(),
    )  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model.safetensors"}}))
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.lock").write_bytes(b"")
    assert len(check_folder(folder)) == 9


def test_a_length_that_looks_like_a_pickle_is_no_pickle(tmp_path):
    # A safetensors file begins with the length of its header: 0x280 begins with the bytes of a pickle's protocol 2.
    folder = model(tmp_path / "m")
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(0x280)
    (folder / "model.safetensors").write_bytes((0x280).to_bytes(8, "little") + header + b"\0")
    assert (folder / "model.safetensors").read_bytes()[:2] == b"\x80\x02"
    assert check_folder(folder) == ["config.json", "model.safetensors"]
