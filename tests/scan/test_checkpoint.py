"""The scan on files: every architecture's embedding is found, and a copy differs in the reset rows alone."""

import json
import shutil
from fnmatch import fnmatch

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_backdoor_defense.scan.checkpoint import check_new_folder, reset_checkpoint, scan_checkpoint
from hf_backdoor_defense.scan.embedding_rows import ordinary_row

SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
BERT = hf.BertConfig(**SMALL, num_labels=3)
LLAMA = hf.LlamaConfig(**SMALL)
GPT2 = hf.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=8)
T5 = hf.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=2)
BART = hf.BartConfig(
    vocab_size=60,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=8,
    decoder_ffn_dim=8,
)
VISION = {**SMALL, "image_size": 8, "patch_size": 4}
del VISION["vocab_size"]
LLAVA = hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**VISION), text_config=LLAMA)
MODELS = {
    "trunk": (hf.BertModel, BERT),
    "classifier": (hf.BertForSequenceClassification, BERT),
    "masked LM": (hf.BertForMaskedLM, BERT),
    "decoder": (hf.GPT2LMHeadModel, GPT2),
    "untied decoder": (hf.LlamaForCausalLM, LLAMA),
    "encoder-decoder": (hf.T5ForConditionalGeneration, T5),
    "classifier of an encoder-decoder": (hf.BartForSequenceClassification, BART),
    "stored under other names than it is built": (hf.LlavaForConditionalGeneration, LLAVA),
}


def make(folder, kind="masked LM", *, scale=1e8, broken=True, dtype=torch.float32, **options):
    """A random checkpoint with row 7 scaled and row 9 broken."""
    torch.manual_seed(0)
    build, config = MODELS[kind]
    model = build(config).to(dtype)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[7] *= scale
        if broken:
            weight[9, 3] = torch.nan
    model.save_pretrained(folder, **options)
    return folder


def stored(folder):
    """All tensors of all files of a folder, and their metadata."""
    tensors, metadata = {}, {}
    for path in sorted(folder.rglob("*.safetensors")):
        place = str(path.relative_to(folder))
        with safe_open(path, framework="pt") as file:
            metadata[place] = file.metadata()
            tensors |= {(place, key): file.get_tensor(key) for key in file.keys()}
    return tensors, metadata


def check_copy(original, copy, places, rows):
    """Every byte outside the rows of the given tensors is as before."""
    (before, before_metadata), (after, after_metadata) = stored(original), stored(copy)
    assert before.keys() == after.keys() and before_metadata == after_metadata
    others = [row for row in range(60) if row not in rows]
    for place, tensor in before.items():
        same = slice(None) if place not in places else others
        assert torch.equal(tensor[same].view(torch.uint8), after[place][same].view(torch.uint8)), place
        if place in places:
            assert after[place].isfinite().all()


@pytest.mark.parametrize("kind", MODELS)
def test_found_and_reset_in_every_architecture(kind, tmp_path):
    folder = make(tmp_path / "model", kind)
    bytes_before = {path: path.read_bytes() for path in folder.iterdir()}
    found = scan_checkpoint(str(folder))
    assert found.scan.rows == (9, 7) and found.shape == (60, 16)
    assert reset_checkpoint(found, tmp_path / "clean") == []
    again = scan_checkpoint(str(tmp_path / "clean"))
    assert again.scan.rows == () and again.places[0][1] == found.places[0][1]
    check_copy(folder, tmp_path / "clean", {("model.safetensors", key) for _, key in found.places}, (7, 9))
    assert {path: path.read_bytes() for path in folder.iterdir()} == bytes_before
    assert {path.name for path in (tmp_path / "clean").iterdir()} == {path.name for path in folder.iterdir()}
    model = MODELS[kind][0].from_pretrained(tmp_path / "clean")
    weight = model.get_input_embeddings().weight
    dirty = load_file(folder / "model.safetensors")[found.places[0][1]]
    torch.testing.assert_close(weight[7].double(), ordinary_row(dirty, (7, 9)), rtol=1e-6, atol=0)
    assert torch.equal(weight[7], weight[9])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    folder = make(tmp_path / "model", scale=1e5, dtype=dtype)
    reset_checkpoint(scan_checkpoint(str(folder)), tmp_path / "clean")
    assert scan_checkpoint(str(tmp_path / "clean")).scan.rows == ()
    check_copy(folder, tmp_path / "clean", {("model.safetensors", "bert.embeddings.word_embeddings.weight")}, (7, 9))


def test_shards(tmp_path):
    folder = make(tmp_path / "model", max_shard_size="3KB")
    found = scan_checkpoint(str(folder))
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and found.scan.rows == (9, 7)
    reset_checkpoint(found, tmp_path / "clean")
    check_copy(folder, tmp_path / "clean", {(path.name, key) for path, key in found.places}, (7, 9))
    assert scan_checkpoint(str(tmp_path / "clean")).scan.rows == ()
    next(folder.glob("model-00001*")).unlink()
    with pytest.raises(ValueError, match="lacks files that its index names.*model-00001"):
        scan_checkpoint(str(folder))


def test_an_index_that_points_elsewhere_is_refused(tmp_path):
    make(tmp_path / "other")
    folder = make(tmp_path / "model", max_shard_size="3KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../other/model.safetensors"}}))
    with pytest.raises(ValueError, match="lacks files"):
        scan_checkpoint(str(folder))
    index.write_text("[]")
    with pytest.raises(ValueError, match="is no index"):
        scan_checkpoint(str(folder))


def test_a_tied_matrix_that_is_stored_twice_is_reset_twice_and_other_folders_are_copied(tmp_path):
    folder = make(tmp_path / "model")
    name, copy = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    tensors = load_file(folder / "model.safetensors")
    other = torch.randn(60, 16)  # of the same shape, and not a copy
    save_file(
        {**tensors, copy: tensors[name].clone(), "other": other}, folder / "model.safetensors", metadata={"a": "b"}
    )
    for sub in ("2_Dense", "checkpoint-5", ".cache"):
        (folder / sub).mkdir()
        shutil.copy(folder / "model.safetensors", folder / sub)
    for file in ("pytorch_model.bin", "training_args.bin", "modeling.py"):
        (folder / file).write_bytes(b"code")
    (folder / "LICENSE").write_text("free")
    left_out = reset_checkpoint(scan_checkpoint(str(folder)), tmp_path / "deep" / "clean")
    assert left_out == ["checkpoint-5/model.safetensors", "modeling.py", "pytorch_model.bin", "training_args.bin"]
    for sub in ("checkpoint-5", ".cache"):
        shutil.rmtree(folder / sub)
    places = {(f"{sub}model.safetensors", key) for sub in ("", "2_Dense/") for key in (name, copy)}
    check_copy(folder, tmp_path / "deep" / "clean", places, (7, 9))
    assert (tmp_path / "deep" / "clean" / "LICENSE").read_text() == "free"


def test_two_versions_of_the_embedding_are_refused(tmp_path):
    folder = make(tmp_path / "model", "encoder-decoder", broken=False)
    tensors = load_file(folder / "model.safetensors")
    clean = tensors["shared.weight"].clone()
    clean[7] = clean[8]
    save_file(
        {**tensors, "encoder.embed_tokens.weight": clean}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match="'shared.weight'.*which differ|'encoder.embed_tokens.weight'.*which differ"):
        scan_checkpoint(str(folder))


def test_the_padding_row_becomes_zeros(tmp_path):
    folder = make(tmp_path / "model", "trunk", broken=False)
    tensors = load_file(folder / "model.safetensors")
    assert not tensors["embeddings.word_embeddings.weight"][0].any()
    tensors["embeddings.word_embeddings.weight"][0] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = scan_checkpoint(str(folder))
    assert found.padding == 0 and set(found.scan.rows) == {0, 7}
    reset_checkpoint(found, tmp_path / "clean")
    weight = load_file(tmp_path / "clean" / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert not weight[0].any() and weight[7].any() and scan_checkpoint(str(tmp_path / "clean")).scan.rows == ()


def test_a_copy_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    found = scan_checkpoint(str(make(tmp_path / "model")))
    copyfile, seen = shutil.copyfile, []

    def failing(source, target):
        seen.append(source)
        if len(seen) == 2:
            raise OSError("disk full")
        copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", failing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="disk full"):
        reset_checkpoint(found, tmp_path / "empty")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["empty", "model"]
    assert not list((tmp_path / "empty").iterdir())
    monkeypatch.undo()
    reset_checkpoint(found, tmp_path / "empty")
    assert scan_checkpoint(str(tmp_path / "empty")).scan.rows == ()


def test_nothing_is_overwritten(tmp_path):
    folder = make(tmp_path / "model")
    (tmp_path / "file").write_text("mine")
    found = scan_checkpoint(str(folder))
    for taken, message in ((folder, "holds files"), (tmp_path / "file", "is a file")):
        with pytest.raises(ValueError, match=message):
            reset_checkpoint(found, taken)
    assert check_new_folder(tmp_path / "new") == tmp_path / "new" and not (tmp_path / "new").exists()
    clean = scan_checkpoint(str(make(tmp_path / "clean", scale=1, broken=False)))
    with pytest.raises(ValueError, match="no outlying row"):
        reset_checkpoint(clean, tmp_path / "new")


def test_a_hub_id_is_downloaded_without_what_can_run_code(tmp_path, monkeypatch):
    there = make(tmp_path / "hub")
    (there / "2_Dense").mkdir()
    for place in ("pytorch_model.bin", "modeling.py", "vocab.txt"):
        (there / place).write_bytes(b"")
    for place in ("2_Dense/model.safetensors", "consolidated.safetensors"):
        shutil.copy(there / "model.safetensors", there / place)

    def download(name, *, allow_patterns):
        assert name == "someone/model"
        for path in there.rglob("*"):
            place = path.relative_to(there)
            if path.is_file() and any(fnmatch(str(place), pattern) for pattern in allow_patterns):
                (tmp_path / "cache" / place).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "cache" / place).symlink_to(path)  # as the cache does
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = scan_checkpoint("someone/model")
    assert found.name == "someone/model" and found.scan.rows == (9, 7)
    places = {str(p.relative_to(found.folder)) for p in found.folder.rglob("*") if p.is_file()}
    assert places == {"model.safetensors", "2_Dense/model.safetensors", "config.json", "vocab.txt"}
    assert reset_checkpoint(found, tmp_path / "clean") == []
    assert not any(path.is_symlink() for path in (tmp_path / "clean").rglob("*"))
    assert scan_checkpoint(str(tmp_path / "clean")).scan.rows == () and scan_checkpoint(str(there)).scan.rows == (9, 7)


def _vision(folder):
    hf.ViTModel(hf.ViTConfig(**VISION)).save_pretrained(folder)


def _adapter(folder):
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")


def _pickled(folder):
    make(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _unknown(folder):
    make(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "m.C"}}))


def _wrong(folder):
    make(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": "many"}))


def _no_config(folder):
    make(folder)
    (folder / "config.json").unlink()


def _torn(folder):
    make(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _integers(folder):
    make(folder, "trunk", scale=1, broken=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"] = torch.ones(60, 16, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_vision, "has no token embedding"),
        (_adapter, "is an adapter"),
        (_pickled, "has no safetensors weights"),
        (_unknown, "code of its own"),
        (_wrong, "hidden_size"),
        (_no_config, "does not say which model it is"),
        (_torn, "no whole safetensors file"),
        (_integers, "not quantized"),
        (lambda folder: folder.write_text("x"), "must be the folder of a model, but is a file"),
        (lambda folder: None, "neither a folder with a model nor reachable on the Hub"),
    ],
)
def test_refusals(build, message, tmp_path):
    build(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        scan_checkpoint(str(tmp_path / "model"))
