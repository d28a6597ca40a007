"""How a published model is loaded: the Python of its card.

| role | loaded by |
|---|---|
| cleaned, and attacked encoders | `load_pretrained_whole`, which keeps pooler and pre-training head |
| fine_tuned, purified, attacked | the class of its task in transformers, or in peft for an adapter |
| filter | the filter's own `from_pretrained`, on the base that it belongs to |
"""

from hf_backdoor_defense.hub.evidence import Evidence, Publication

AUTO_CLASSES = {
    "text-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "question-answering": "QuestionAnswering",
    "multiple-choice": "MultipleChoice",
    "fill-mask": "MaskedLM",
    "text-generation": "CausalLM",
    "summarization": "Seq2SeqLM",
    "translation": "Seq2SeqLM",
    "text2text-generation": "Seq2SeqLM",
    "image-classification": "ImageClassification",
    "feature-extraction": "",
    "image-feature-extraction": "",
    "sentence-similarity": "",
}
_IMAGES = ("image-classification", "image-feature-extraction")
_FILTERS = {"confidence": "ConfidenceFilter", "strip": "STRIP", "onion": "ONION", "rap": "RAP"}


def how_to_load(evidence: Evidence) -> str:
    """The sentence before the code."""
    entry = evidence.entry
    if entry.role == "filter":
        sha256 = entry.weights_sha256[:12]
        return (
            f"The filter belongs to one base, as it was downloaded: its weights have the SHA-256 `{sha256}…`, counted over the "
            "tensors as `hf_backdoor_defense.models.weights_sha256` does. Other weights are refused."
        )
    if _is_pretrained(evidence):
        return (
            "Load it whole: loaders that know one head drop the pooler or the masked-LM head, and whatever sat in there only "
            "seems to be gone."
        )
    sentence = "The weights are safetensors, and no code of this repository runs."
    if _has_defense(evidence):
        sentence += " `load_defenses` gives the method with its settings, for a further training."
    return sentence


def usage(evidence: Evidence, publication: Publication) -> str:
    """Python that loads it."""
    role, repo = evidence.entry.role, publication.repo_id
    if role == "filter":
        return _filter(evidence, publication)
    if _is_pretrained(evidence):
        first = "from hf_backdoor_defense import load_pretrained_whole"
        return f'{first}\n\nmodel, tokenizer = load_pretrained_whole("{repo}")'
    return _model(evidence, repo)


def _is_pretrained(evidence: Evidence) -> bool:
    entry = evidence.entry
    return entry.role == "cleaned" or (entry.role == "attacked" and entry.pipeline_tag == "fill-mask")


def _has_defense(evidence: Evidence) -> bool:
    return bool(evidence.entry.method) and evidence.entry.role != "attacked"


def _filter(evidence: Evidence, publication: Publication) -> str:
    name, repo = evidence.entry.method.get("name") or evidence.entry.arm, publication.repo_id
    if name in _FILTERS:
        lines = [
            f"from hf_backdoor_defense.input_filters.{name} import {_FILTERS[name]}",
            "",
            f'detector = {_FILTERS[name]}.from_pretrained("{repo}", model, tokenizer)  # the classifier that it guards',
        ]
    else:
        base, where = publication.base_model, f"SHA-256 {evidence.entry.weights_sha256[:12]}…"
        if base is None:
            base, where = "path/to/the/base", f"{where}: it is not on the Hub, and its owner must give it to you"
        lines = [
            "from hf_backdoor_defense import PSIMFilter",
            "",
            f'base = "{base}"  # {where}',
            f'detector = PSIMFilter.from_pretrained("{repo}", base=base)',
        ]
    return "\n".join([*lines, 'flagged = detector.flag(["a text"])  # True: do not trust the answer to it'])


def _model(evidence: Evidence, repo: str) -> str:
    entry, peft = evidence.entry, evidence.entry.library == "peft"
    head = AUTO_CLASSES[entry.pipeline_tag]
    processor = "AutoImageProcessor" if entry.pipeline_tag in _IMAGES else "AutoTokenizer"
    auto = f"{'AutoPeftModel' if peft else 'AutoModel'}{'For' if head else ''}{head}"
    options = f", num_labels={len(entry.labels)}" if peft and entry.labels else ""
    lines = ["from hf_backdoor_defense.hub.load import load_defenses"] if _has_defense(evidence) else []
    lines += (
        [f"from peft import {auto}", f"from transformers import {processor}"]
        if peft
        else [f"from transformers import {auto}, {processor}"]
    )
    lines += [
        "",
        f'model = {auto}.from_pretrained("{repo}"{options})',
        f'processor = {processor}.from_pretrained("{repo}")',
    ]
    return "\n".join(lines + ([f'defenses = load_defenses("{repo}")'] if _has_defense(evidence) else []))
