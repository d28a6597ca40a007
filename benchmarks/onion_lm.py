"""The causal language model that ONION reads texts with: small, from scratch, in minutes on one core.

    python -m benchmarks.onion_lm [--output runs/onion_lm]

GPT-2's architecture (3 layers of 192) over MiniLM's vocabulary, trained on the clean sentences of sst2 train and wikitext2 train.
Half of the 30,522 tokens do not occur there, and these must become improbable too, or a rare word would not be strange. Full
logits would cost ten times the rest of a step, so the sum over the vocabulary is exact over the batch's own tokens and estimated
from a random sample of the others:

    Z = sum over batch tokens of exp(z_j) + (V - B) / S * sum over S sampled others of exp(z_j)

Beside the model lies `onion_lm.json` with what it is worth, by full logits: perplexity over the tokens of sst2 validation, and
ONION's own detection there. What is there already is kept.

| figure | of |
|---|---|
| perplexity | all 872 validation texts, every token weighing the same; of this vocabulary's tokens, not comparable with others |
| auroc | ONION's score on 100 validation texts with the word `mn` inserted against 100 others without: 0.5 is chance |
| auroc_low | lower end of the 95 % interval of that auroc (DeLong's variance) |
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from benchmarks.grid import RESULTS
from hf_backdoor_defense.attacks.triggers import BadNets
from hf_backdoor_defense.evaluation.metrics import auroc
from hf_backdoor_defense.input_filters.onion import ONION
from hf_backdoor_defense.models import OFFLINE_MODEL, resolve
from hf_backdoor_defense.reporting.results import Record, append_records, environment

DATA = Path(__file__).parents[2] / "shared" / "data"
FOLDER = Path("runs") / "onion_lm"
FACTS = "onion_lm.json"
LAYERS, WIDTH, POSITIONS = 3, 192, 128
EPOCHS, BATCH, RATE, SAMPLED = 3, 32, 2e-3, 2000
EACH = 100  # texts with and texts without the word


def language_model(folder: str | Path = FOLDER) -> Path:
    """The folder with the model, trained where it is not there yet. Raises FileNotFoundError where the data is absent."""
    folder = Path(folder)
    if (folder / FACTS).is_file():
        return folder
    texts = [*read("sst2", "train"), *read("wikitext2", "train")]
    held_out = read("sst2", "validation")
    folder.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(resolve(OFFLINE_MODEL))
    model = train(tokenizer, texts)
    seconds = time.process_time() - start  # of one core, whatever else runs there
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {
        "cpu_seconds": round(seconds, 1),
        "parameters": model.num_parameters(),
        **judged(model, tokenizer, held_out),
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")  # last: it says that the folder is whole
    return folder


def read(name: str, split: str) -> list[str]:
    """Texts of a data set beside the project."""
    path = DATA / name / f"{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{name} is absent: benchmark data is no part of the package")
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def train(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> GPT2LMHeadModel:
    """Cross-entropy over the tokens after [CLS], batches of like length."""
    set_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.98), fused=True)
    ids = tokenizer(texts, truncation=True, max_length=POSITIONS)["input_ids"]
    per_epoch = -(-len(ids) // BATCH)
    schedule = get_cosine_schedule_with_warmup(optimizer, per_epoch // 4, EPOCHS * per_epoch)
    draw = np.random.default_rng(0)
    for _ in range(EPOCHS):
        # Sorted by length with some noise, cut, and the cuts shuffled: little padding, other neighbors each epoch.
        order = np.argsort([len(row) + draw.uniform(0, 3) for row in ids])
        for part in tqdm(draw.permutation(per_epoch), leave=False, mininterval=10):
            rows = [ids[i] for i in order[part * BATCH : (part + 1) * BATCH]]
            batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
            sampled_loss(model, batch["input_ids"], batch["attention_mask"]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(), schedule.step(), optimizer.zero_grad()
    return model.eval()


def sampled_loss(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean of log Z - z_target over the tokens after the first: the module's formula."""
    hidden = model.transformer(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]  # [batch, time - 1, width]
    following = mask[:, 1:].bool()
    own, targets = ids[:, 1:][following].unique(return_inverse=True)
    others = torch.ones(model.config.vocab_size).index_fill(0, own, 0.0)
    drawn = others.multinomial(SAMPLED)
    logits = hidden[following] @ model.lm_head.weight[torch.cat([own, drawn])].T  # [tokens, own + drawn]
    weight = torch.cat([torch.zeros(len(own)), (others.sum() / SAMPLED).log().expand(SAMPLED)])
    return torch.nn.functional.cross_entropy(logits + weight, targets)


def judged(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, float]:
    """What the model is worth to ONION, on texts that it was not trained on."""
    onion = ONION(model, tokenizer)
    draw = np.random.default_rng(0)
    chosen = [texts[i] for i in draw.permutation(len(texts))[: 2 * EACH]]
    trigger = BadNets(words=("mn",))
    inserted = [trigger.insert(text, draw) for text in chosen[:EACH]]
    bad, good = onion.score(inserted), onion.score(chosen[EACH:])
    area = auroc(np.concatenate([bad, good]), [True] * EACH + [False] * EACH)
    wins = (bad[:, None] > good) + 0.5 * (bad[:, None] == good)
    deviation = np.sqrt(wins.mean(1).var(ddof=1) / EACH + wins.mean(0).var(ddof=1) / EACH)
    return {
        "perplexity": round(onion.perplexity(texts), 2),
        "auroc": round(area, 4),
        "auroc_low": round(float(area - 1.96 * deviation), 4),
        "passes": round(onion.passes, 1),
    }


def main() -> None:
    """Make it where needed, and say what it is worth."""
    parser = argparse.ArgumentParser(prog="benchmarks.onion_lm", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=FOLDER)
    args = parser.parse_args()
    try:
        folder = language_model(args.output)
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        return
    text = (folder / FACTS).read_text()
    print(f"{folder}: {text}")
    path = RESULTS / "onion_lm.jsonl"
    path.unlink(missing_ok=True)
    facts = json.loads(text)
    common: dict[str, Any] = {
        "benchmark": "onion_lm", "dataset": "sst2 validation", "model": f"GPT-2, {LAYERS} layers of {WIDTH}",
        "attack": "badnets", "defense": "onion", "setting": "from scratch", "seed": 0, "env": environment(),
    }  # fmt: skip
    append_records(
        path,
        [
            Record(metric="perplexity", value=facts["perplexity"], **common),
            Record(metric="auroc", value=facts["auroc"], n=2 * EACH, **common),
        ],
    )
    AutoTokenizer.from_pretrained(folder), GPT2LMHeadModel.from_pretrained(folder, use_safetensors=True)


if __name__ == "__main__":
    main()
