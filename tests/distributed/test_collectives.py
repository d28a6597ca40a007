"""What a defense makes processes say to each other in an update, beyond what plain training does: at most one all-reduce a
penalty, however many matrices there are.

| where | counted over |
|---|---|
| replicas (DDP) | updates 2 to 5 of a training by the Trainer, against the same training without a defense |
| shards (FSDP2) | one update by hand: forward, loss, penalties, backward, the events before and after the step |

DDP's own are an all-reduce of gradients, one of which parameters were used, and a broadcast of buffers; the Trainer adds a
gathering of the number of labels. FSDP2's own are a gathering per group and direction, and a reduction per group.
"""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch.distributed.tensor.debug import CommDebugMode
from transformers import BertConfig, BertForMaskedLM, TrainerCallback, set_seed

from hf_backdoor_defense.defenses.d3 import D3
from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.defenses.matched_decay import MatchedDecay
from hf_backdoor_defense.defenses.recipe import RECIPE
from hf_backdoor_defense.defenses.ulrl import ULRL
from hf_backdoor_defense.functional.row_scores import row_change
from hf_backdoor_defense.functional.weights import frobenius_norms
from hf_backdoor_defense.objectives import Objective, Step
from hf_backdoor_defense.targets import target_weights
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.distributed.collectives import Collectives
from tests.distributed.test_purifiers import shard
from tests.distributed.test_sharded import hidden_of
from tests.trainers.image_toys import image_list, stack, vit
from tests.trainers.toys import arguments

LAYERS = (2, 4)
UPDATES = 6


def encoder(layers: int) -> BertForMaskedLM:
    set_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    return BertForMaskedLM(config)


def sentences(count: int = 24) -> list[dict[str, Any]]:
    ids = torch.randint(2, 50, (count, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(6) % 3 == 0, ids, -100)
    return [
        {"input_ids": row.tolist(), "labels": told.tolist(), "row_id": i}
        for i, (row, told) in enumerate(zip(ids, labels, strict=True))
    ]


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def classifier(layers: int) -> torch.nn.Module:
    return vit(layers=layers)


# Model, rows, collator, and the method with its neurons or matrices found.
IMAGES, TEXTS = (classifier, image_list, stack), (encoder, sentences, padded)
REPLICAS = {
    "plain": (IMAGES, lambda: []),
    "dece": (IMAGES, lambda: [DeCE(alpha_base=0.7)]),
    "matched_decay": (IMAGES, lambda: [MatchedDecay(pull=[0.5])]),
    "d3": (IMAGES, lambda: [D3()]),
    "ulrl": (IMAGES, lambda: [ULRL(z_threshold=0.1, unlearn_epochs=2, unlearn_lr=0.005)]),
    "plain_text": (TEXTS, lambda: []),
    "dece_text": (TEXTS, lambda: [DeCE(alpha_base=0.7)]),
    "recipe": (TEXTS, lambda: [RECIPE(allow_unknown_head=True, trainable="all")]),
}


class PerUpdate(TrainerCallback):
    """What was said by the end of each update."""

    def __init__(self, talk: Collectives) -> None:
        self.talk, self.totals = talk, [Counter[str]()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.totals.append(self.talk.counts())


def replicated(folder: Path, name: str) -> dict[str, float]:
    """Collectives per update of a training on two processes."""
    (make, rows, collate), objectives = REPLICAS[name]
    talk = Collectives()
    watch = PerUpdate(talk)
    trainer = DefendedTrainer(
        make(LAYERS[0]),
        args=arguments(folder / name, per_device_train_batch_size=2, max_steps=UPDATES, num_train_epochs=1),
        train_dataset=rows(24),
        data_collator=collate,
        defense=objectives(),
        callbacks=[watch],
    )
    with talk:
        trainer.train()
    assert trainer.accelerator.num_processes == 2 and len(watch.totals) == UPDATES + 1
    assert name != "ulrl" or trainer.objectives[0].activity()["ulrl_flagged"]  # a penalty is there to be counted
    during = watch.totals[5] - watch.totals[1]
    return {name: count / 4 for name, count in sorted(during.items())}


def hosted(name: str, model: torch.nn.Module) -> Objective | None:
    """The method as it is after `prepare`, with the whole model in hand."""
    if name == "d3":
        d3 = D3()
        d3.prepare(SimpleNamespace(model=model, args=SimpleNamespace(seed=0)), checkpoint=None)
        return d3
    if name.startswith("ulrl"):
        layer = "classifier" if name == "ulrl_rows" else hidden_of(model).removesuffix(".weight")
        ulrl, none = ULRL(alpha=5.0), torch.zeros(5)
        old = dict(model.named_parameters())[f"{layer}.weight"].detach()[[1, 3]].clone()
        ulrl.load_state_dict({
            "old": old, "scores": none, "z": none, "cosine": torch.zeros(()), "flagged": [1, 3], "accuracies": [], "unlearned": 1,
            "stop": 0.2, "layer": layer, "units": "rows" if name == "ulrl_rows" else "hidden",
        })  # fmt: skip
        return ulrl
    if name == "recipe":
        recipe = RECIPE(trainable="all")
        recipe._names = list(target_weights(model, "auto"))
        recipe._start = [1.0] * len(recipe._names)
        return recipe
    return {
        "plain": lambda: None,
        "dece": lambda: DeCE(alpha_base=0.7),
        "matched_decay": lambda: MatchedDecay(pull=[0.5]),
    }[name]()


def update(name: str, layers: int, mode: Any) -> Any:
    """One update of a sharded model under a mode that counts: the second one, since FSDP2 sets itself up in the first."""
    make, rows, collate = TEXTS if name in ("recipe", "plain_text") else IMAGES
    model = make(layers)
    objective = hosted(name.removesuffix("_text"), model)
    shard(model, reshard_after_forward=True)
    if objective is not None:
        objective.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model)
    inputs = {key: value for key, value in collate(rows(8)).items() if key != "row_id"}
    labels = inputs.pop("labels")
    optimizer, host = torch.optim.SGD(model.parameters(), 0.01), objective or Objective()
    state = SimpleNamespace(epoch=0.0, global_step=0)
    for counted in (False, True):
        step = Step(
            model=model, inputs=inputs, labels=labels, row_ids=None, epoch=0.0, global_step=0, training=True
        )  # fmt: skip
        with mode if counted else torch.enable_grad():
            step.logits = model(**inputs).logits
            loss = host.loss(step).mean() + sum(host.penalties(step).values())
            loss.backward()
            host.on_pre_optimizer_step(None, state, None, model=model, optimizer=optimizer)
            optimizer.step()
            host.on_optimizer_step(None, state, None, model=model, optimizer=optimizer)
            optimizer.zero_grad()
    return mode


SHARDS = ["plain", "dece", "matched_decay", "d3", "ulrl_rows", "ulrl_hidden", "plain_text", "recipe"]


def both(folder: Path) -> None:
    """On each of two processes."""
    rank = PartialState(cpu=True).process_index
    told: dict[str, Any] = {"shards": {}, "sizes": {}}
    told["replicas"] = {name: replicated(folder, name) for name in REPLICAS}
    for layers in LAYERS:
        counted = {name: update(name, layers, Collectives()) for name in SHARDS}
        told["shards"][layers] = {name: mode.counts() for name, mode in counted.items()}
        told["sizes"][layers] = {
            name: [size for kind, size in mode.seen if kind == "allreduce_"] for name, mode in counted.items()
        }
    matrices = list(target_weights(shard(encoder(2), reshard_after_forward=True), "auto").values())
    for key, mode in (("torch", CommDebugMode()), ("ours", Collectives())):
        with mode:
            frobenius_norms(matrices).sum().backward()
            row_change(matrices[0], matrices[0])
            matrices[0].full_tensor()
        told[key] = mode.get_total_counts() if key == "torch" else len(mode.seen)
    (folder / f"counts{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module", params=[0, 1])
def counts(request, two):
    return json.loads((two("test_collectives") / f"counts{request.param}.json").read_text())


def test_on_replicas_a_defense_says_nothing(counts):
    found = counts["replicas"]
    assert found["plain"] and found["plain_text"]  # something is counted: labels, summed over processes
    for name, said in found.items():
        assert said == found["plain_text" if REPLICAS[name][0] is TEXTS else "plain"], name


BEYOND = {
    "dece": 0,
    "matched_decay": 0,
    "d3": 2,
    "ulrl_rows": 1,
    "ulrl_hidden": 1,
    "recipe": 1,
}  # D3: its pull, its projection


@pytest.mark.parametrize("name", BEYOND)
def test_on_shards_a_penalty_is_one_all_reduce_however_many_matrices_there_are(counts, name):
    for layers in map(str, LAYERS):
        found, plain = (
            Counter(counts["shards"][layers][n]) for n in (name, "plain_text" if name == "recipe" else "plain")
        )
        assert plain and not plain - found
        assert dict(found - plain) == ({"allreduce_": BEYOND[name]} if BEYOND[name] else {}), layers


def test_what_is_said_is_a_number_per_matrix(counts):
    for name in ("d3", "recipe"):
        few, many = (max(counts["sizes"][str(layers)][name]) for layers in LAYERS)
        assert few < many < 64


def test_torch_counts_the_same(counts):
    assert counts["torch"] == counts["ours"] == 3  # an all-reduce of norms, a gathering of sums, and of a whole weight
