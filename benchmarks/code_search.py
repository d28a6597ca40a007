"""The host of `benchmarks.code_poisoning`, and where DeCE's trade-off lies: on validation rows and a seed of its own.

    python -m benchmarks.code_search                    # what decides the host: undefended, judged by BLEU
    python -m benchmarks.code_search --extended         # the sweep over alpha: it reads triggered rows and decides nothing

The host's rate and batch are to be what an attacked user would take: fine-tuned on the poisoned rows, the best BLEU on validation
rows as they are. ASR stands beside it and decides the epochs alone, since only a host that takes the backdoor can be defended.

The sweep shows how ASR and BLEU move around the preset `code` (.985, smoothing .05): with plain warm-up epochs, a higher base,
a lower one: .94 lies below the bound for 5 % (docs/choosing.md, dece) from its first epoch on. No preset is chosen by it;
the lead that it found is a cell of the benchmark, "below the bound", which other seeds and test rows are to judge.
Its control is the undefended cell with the benchmark's own rate, batch and epochs.
"""

from benchmarks.code_poisoning import DATA, EPOCHS, SCHEDULE, pretraining, run_cell
from benchmarks.grid import Cell, run_grid

SEED = 100
CELLS = [
    *(
        Cell(
            f"undefended, rate {rate:g} {'falling' if schedule == 'linear' else 'held'}, batch {batch}, epochs {epochs}",
            {"learning_rate": rate, "batch": batch, "epochs": epochs, "schedule": schedule, "judged": "validation"},
            defense=(),
            needs=DATA,
        )
        for rate, schedule, batch, epochs in (
            (2e-3, "linear", 8, 5),
            (2e-3, SCHEDULE, 8, EPOCHS),
            (1e-3, SCHEDULE, 8, EPOCHS),
            (1e-3, SCHEDULE, 4, EPOCHS),
        )
    ),
    *(
        Cell(
            f"alpha {alpha:g}, smoothing 0.05" + (f", warm-up {warm_up}" if warm_up else ""),
            {"judged": "validation"},
            defense=({"name": "dece", "alpha_base": alpha, "label_smoothing": 0.05, "warmup_epochs": warm_up},),
            extended=True,
            needs=DATA,
        )
        for alpha, warm_up in ((0.985, 0), (0.985, 2), (0.94, 0), (0.94, 2), (0.999, 0))
    ),
]


def main() -> None:
    """The grid, once the pretrained model is there."""
    run_grid("code_search", CELLS, (SEED,), run=run_cell, pretrained=pretraining())


if __name__ == "__main__":
    main()
