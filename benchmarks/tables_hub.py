"""What a push costs, rendered from results/hub.jsonl; what was measured again stands for what was measured before."""

from benchmarks.grid import RESULTS
from benchmarks.tables_filters import grid, measured_at
from hf_backdoor_defense.reporting.results import Record, read_records

TITLES = {
    "upload_folder": "`create_repo` and `upload_folder`",
    "upload_folder_again": "the same again (what noise does)",
    "publish": "`publish`: seal checked, card rendered, one commit",
}
GOAL, CARD_GOAL = 1.2, 1.0


def table() -> str:
    """docs/publishing.md."""
    records = read_records(RESULTS / "hub.jsonl")
    found: dict[tuple[str, str, str], Record] = {}
    for r in records:
        found[r.defense, r.setting if r.defense == "render_card" else "", r.metric] = r
    rows = [
        [title, f"{found[peer, '', 'seconds'].value:.2f}", f"{found[peer, '', 'time_ratio'].value:.2f}"]
        for peer, title in TITLES.items()
    ]
    own = found["publish", "", "time_ratio"]
    cards = [found["render_card", setting, "seconds"].value for setting in ("first in a process", "later")]
    said = [
        f"{own.setting}, medians over {own.n} pushes of each, to new repositories of a Hub on the same machine.",
        f"Goal: at most {GOAL:g} times, {'met' if own.value <= GOAL else 'missed'}.",
        f"A card takes {cards[0]:.2f} s, the first one of a process, and {cards[1]:.2f} s later "
        f"(goal: at most {CARD_GOAL:g} s, {'met' if max(cards) <= CARD_GOAL else 'missed'}).",
        measured_at([own]),
    ]
    return f"{grid(['push', 'seconds', 'time ×'], rows)}\n\n{' '.join(said)}"
