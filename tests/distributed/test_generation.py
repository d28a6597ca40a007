"""Prompts dealt out over two processes: the texts and figures of one process, on both."""

import json
from pathlib import Path

import torch
from accelerate import PartialState

from hf_backdoor_defense.data.formatting import Formatter
from hf_backdoor_defense.evaluation.generation import evaluate_generation, generate, perplexity
from tests.evaluation.generation_toys import ROWS, llama, rows, tokenizer


def measured(samples: Path, *, gather: bool, ahead: int) -> dict:
    """Rows that two processes cannot share evenly, and one row alone; batches of two."""
    made, model = tokenizer(), llama()
    formatter = Formatter.plain(made)
    prompts = [formatter.prompt_ids(made, row) for row in ROWS]
    told = {
        "texts": generate(model, made, prompts, max_new_tokens=20, batch_size=2, gather=gather),
        "tight": generate(model, made, prompts, max_new_tokens=120, batch_size=2, gather=gather),  # unequal budgets
        "one": generate(model, made, prompts[:1], max_new_tokens=20, gather=gather),
        "perplexity": perplexity(model, made, rows(), formatter=formatter, batch_size=2, gather=gather),
    }
    report = evaluate_generation(
        model, made, rows(), formatter=formatter, triggered=rows().select(range(3)), hit=lambda text: "a" in text, batch_size=2,
        gather=gather, samples=samples / f"{ahead}.jsonl",
    )  # fmt: skip
    return told | {"report": report.to_dict()}


def both(folder: Path) -> None:
    """On each of two processes."""
    rank = PartialState(cpu=True).process_index
    assert torch.distributed.get_world_size() == 2
    # Each would write to a place of its own: only the first one does.
    told = measured(folder, gather=True, ahead=rank)
    (folder / f"told{rank}.json").write_text(json.dumps(told))


def test_two_processes_measure_what_one_does(two, tmp_path):
    folder = two("test_generation")
    told = [json.loads((folder / f"told{rank}.json").read_text()) for rank in range(2)]
    alone = json.loads(json.dumps(measured(tmp_path, gather=False, ahead=0)))
    assert abs(told[0].pop("perplexity") / alone.pop("perplexity") - 1) < 1e-5
    told[1].pop("perplexity")
    assert told[0] == told[1] == alone
    assert len(set(alone["texts"])) == len(ROWS)
    assert (folder / "0.jsonl").read_bytes() == (tmp_path / "0.jsonl").read_bytes() and not (
        folder / "1.jsonl"
    ).exists()
