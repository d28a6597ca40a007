"""What a card says of a method, whatever was measured: what it does, whose it is, and where it ends.

Papers are named as docs/papers.md names them, with no more than stands there; a test compares. Figures stand nowhere here.
"""

from dataclasses import dataclass

from hf_backdoor_defense.hub.markdown import code

TRIGGER_ONLY = (
    "The figures are about the trigger that was simulated, at the place where it was put. No figure here shows "
    "that there is no "
    "other backdoor."
)
UNTRIED = "Nothing was measured about triggers. No figure here shows that there is no backdoor."
ADAPTIVE = "An attacker who knows the method and trains against it was not simulated."


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A publication. Empty: not known to docs/papers.md."""

    title: str
    authors: str = ""
    venue: str = ""
    year: str = ""
    arxiv: str = ""
    doi: str = ""

    def short(self) -> str:
        """
        >>> Paper(title="A Title", authors="Doe and Roe and Poe", venue="TACL 11", year="2023").short()
        'Doe, Roe and Poe, *A Title*, TACL 11, 2023'
        """
        *first, last = self.authors.split(" and ")
        authors = f"{', '.join(first)}{' et al.' if last == 'others' else f' and {last}'}" if first else last
        year = "" if self.year in self.venue else self.year
        linked = f"arXiv {self.arxiv}" if self.arxiv else f"doi {self.doi}" if self.doi else ""
        return ", ".join(part for part in (authors, f"*{self.title}*", self.venue, year, linked) if part)

    def bibtex(self, key: str) -> str:
        """
        >>> print(Paper(title="A Title", authors="Doe and Roe", arxiv="2001.00001").bibtex("a"))
        @misc{a,
          title = {A Title},
          author = {Doe and Roe},
          eprint = {2001.00001},
          archivePrefix = {arXiv}
        }
        """
        fields = {
            "title": self.title,
            "author": self.authors,
            "howpublished": self.venue,
            "year": self.year,
            "doi": self.doi,
        }
        fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"} if self.arxiv else {}
        return bibtex("misc", key, fields)


def bibtex(kind: str, key: str, fields: dict[str, str]) -> str:
    """A BibTeX entry of the fields that are not empty.

    >>> print(bibtex("misc", "a", {"title": "A Title", "year": ""}))
    @misc{a,
      title = {A Title}
    }
    """
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items() if value)
    return f"@{kind}{{{key},\n{lines}\n}}"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of the registry.

    Args:
        title: for people. does: ends "made with TITLE, which DOES". against: what it is for; empty for what is no defense.
        limits: sentences. paper: whose it is, or None where it is ours or no paper was read.
    """

    title: str
    does: str
    against: str = ""
    limits: tuple[str, ...] = ()
    paper: Paper | None = None


DATA = "backdoors planted in training data: rows with a trigger and a false label"
CLASSIFIER = "a backdoor in a finished classifier, with a few clean rows of one's own"
ENCODER = "backdoors that the publisher of a pretrained encoder planted in it"
INPUTS = "triggered inputs at a classifier's door"
_RIVAL = "A loss to compare defenses with; nobody published it as a defense against backdoors here."
PURIFIED = (
    "A low attack success does not mean healed: a model that calls every triggered row something else has stopped "
    "the attacker "
    "only. R-Acc, the share of triggered rows that get their true label, says whether they are read again."
)
_FILTER = (
    "A flag says that an input is unlike the clean ones to this model, not that it carries a trigger. Clean "
    "inputs are flagged, too: "
    "at the false rejection rate, as long as they are like the clean texts that the filter was calibrated on."
)
_ENCODER_ATTACK = "A pretrained encoder that was attacked on purpose: triggers survive fine-tuning on clean rows."

METHODS = {
    "dece": Method(
        title="DeCE",
        does="replaces cross-entropy by a loss that hardly pulls towards labels the model finds surprising",
        against=DATA,
        limits=(
            "With few classes DeCE keeps nearly all of cross-entropy's pull, so that a backdoor may be learned as without "
            "it. Compare "
            "with the model that was trained without a defense.",
            "An annealed loss is an early stop, too: what `matched_decay` does as well is not DeCE's.",
        ),
        paper=Paper(
            title="Defending Code Language Models against Backdoor Attacks with Deceptive Cross-Entropy Loss",
            authors="Yang and others",
            venue="ACM TOSEM 35(2)",
            year="2026",
            arxiv="2407.08956",
        ),
    ),
    "trajectory": Method(
        title="the trajectory filter",
        does="drops training rows whose label contradicts the pretrained features and was then learned with great "
        "confidence, and trains again without them",
        against=DATA,
        limits=(
            "The filter needs an encoder that knows something of the task before training.",
            "A clean-label attack leaves no contradiction to find; poisoned texts that resemble the target class are "
            "found less often, and so are few among many.",
            "It drops some clean rows, too.",
        ),
    ),
    "gce": Method(
        title="generalized cross-entropy",
        does="replaces cross-entropy by a loss for noisy labels",
        limits=(_RIVAL,),
        paper=Paper(
            title="Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
            authors="Zhang and Sabuncu",
            arxiv="1805.07836",
        ),
    ),
    "in_trust": Method(
        title="the In-trust loss",
        does="replaces cross-entropy by a loss for noisy labels",
        limits=(_RIVAL,),
        paper=Paper(
            title="Named Entity Recognition via Noise Aware Training Mechanism with Data Filter",
            venue="Findings of ACL 2021",
            year="2021",
        ),
    ),
    "focal": Method(
        title="the focal loss",
        does="replaces cross-entropy by a loss that looks at hard rows, which poisoned rows are",
        limits=("A negative control: it is expected to learn a backdoor.",),
        paper=Paper(title="Focal Loss for Dense Object Detection", authors="Lin and others", arxiv="1708.02002"),
    ),
    "smoothed": Method(title="label smoothing", does="gives a share of every label to all classes", limits=(_RIVAL,)),
    "matched_decay": Method(
        title="matched decay",
        does="trains by cross-entropy with the pull that DeCE had, a control",
        limits=("A control: it shows what an early stop alone does.",),
    ),
    "recipe": Method(
        title="RECIPE",
        does="continues pre-training on plain text while the norms of chosen weight matrices are pressed down",
        against=ENCODER,
        limits=(
            "It knows no trigger and no task. A loss on held-out text and the norms that are left say nothing about "
            "triggers.",
            "What lives outside the pressed matrices stays as it was: embedding rows, unless everything was trained, and "
            "every backdoor of a later fine-tuning.",
            "On the small encoder that it was tried on here it weakened an attack, did not remove it, and cost accuracy.",
        ),
        paper=Paper(
            title="Removing Backdoors in Pre-trained Models by Regularized Continual Pre-training",
            authors="Zhu and others",
            venue="TACL 11",
            year="2023",
            doi="10.1162/tacl_a_00622",
        ),
    ),
    "penalty_only": Method(
        title="RECIPE's penalty alone",
        does="presses the norms of chosen weight matrices down without a pre-training loss, a control",
        limits=("A control: the model forgets its pre-training.",),
    ),
    "pretraining": Method(
        title="plain continued pre-training",
        does="continues pre-training on plain text, a control",
        limits=("A control: no weight was pressed down.",),
    ),
    "d3": Method(
        title="D3",
        does="moves the selected weights away from where they were, on the sphere of their old norm, while the loss on "
        "clean rows holds the task",
        against=CLASSIFIER,
        limits=(
            PURIFIED,
            "It can cost accuracy, and it matters which weights are moved.",
            "The paper's evidence is about convolutional networks on images; for language models there is none.",
        ),
        paper=Paper(
            title="Backdoor Mitigation by Distance-Driven Detoxification",
            authors="Wei and Liu and Zha",
            venue="ICCV 2025",
            year="2025",
            arxiv="2411.09585",
        ),
    ),
    "ulrl": Method(
        title="ULRL",
        does="unlearns clean rows to see which rows of the head move out of proportion, resets these, and learns the task "
        "again",
        against=CLASSIFIER,
        limits=(
            PURIFIED,
            "A suspected class is a hint and no verdict: classes of clean models are flagged, too.",
            "It looks for one target class, or few. Where it finds none, what is left is plain fine-tuning.",
            "With two classes the rows of a head say nothing; the units that feed it are scored instead, which no "
            "publication tried.",
        ),
        paper=Paper(
            title="ULRL: Unified Neural Backdoor Removal with Only Few Clean Samples through Unlearning and Relearning",
            authors="Min and Pham and Sun",
            arxiv="2405.14781",
        ),
    ),
    "ft_sam": Method(
        title="FT-SAM",
        does="fine-tunes on clean rows with sharpness-aware minimization, a control",
        limits=(PURIFIED,),
    ),
    "fine_pruning": Method(
        title="fine-pruning",
        does="cuts the inputs of the head that clean rows use least, and fine-tunes, a control",
        limits=(PURIFIED,),
        paper=Paper(title="Fine-Pruning", authors="Liu and others", venue="RAID 2018", year="2018", arxiv="1805.12185"),
    ),
    "fine_tuning": Method(
        title="plain fine-tuning", does="goes on training with clean rows, a control", limits=(PURIFIED,)
    ),
    "crow": Method(
        title="CROW",
        does="fine-tunes on clean rows while neighboring layers are made to agree, also where the embeddings are perturbed",
        against="a backdoor in a finished language model or its adapter, with about a hundred clean rows of one's own",
        limits=(
            "A low attack success does not mean healed: a model that writes nothing usable gives no payload either. Look at "
            "empty answers and at perplexity, too.",
            "Much of the effect may be the learning rate's: what plain fine-tuning at the same rate does as well is not CROW's.",
            "The clean rows must be clean.",
        ),
        paper=Paper(
            title="CROW: Eliminating Backdoors from Large Language Models via Internal Consistency Regularization",
            authors="Min and Pham and Li and Sun",
            venue="ICML 2025",
            year="2025",
            arxiv="2411.12768",
        ),
    ),
    "psim": Method(
        title="PSIM",
        does="trains an adapter on the untouched base until clean text has no confidence at all, and flags text that keeps "
        "some",
        against=INPUTS + ", where the backdoor is in the base that the classifier was made from",
        limits=(
            _FILTER,
            "It cannot see a backdoor that sits in the victim's own adapter or in the victim's training data.",
            "How many triggered texts pass is bounded by no figure here.",
            "It belongs to one set of base weights in one precision. Give it the very base that the victim was made from; "
            "nothing can tell that a fully tuned victim comes from another.",
        ),
        paper=Paper(
            title="Defending Against Weight-Poisoning Backdoor Attacks for Parameter-Efficient Fine-Tuning",
            authors="Zhao and others",
            venue="Findings of NAACL 2024",
            year="2024",
            arxiv="2402.12168",
        ),
    ),
    "confidence": Method(
        title="the confidence filter",
        does="flags inputs by the classifier's own confidence, a control",
        limits=(_FILTER,),
    ),
    "strip": Method(
        title="STRIP",
        does="mixes other texts into an input and flags it where the answers stay the same",
        against=INPUTS,
        limits=(_FILTER,),
        paper=Paper(
            title="STRIP: A Defence Against Trojan Attacks on Deep Neural Networks",
            authors="Gao and others",
            arxiv="1911.10312",
        ),
    ),
    "onion": Method(
        title="ONION",
        does="flags texts with words whose removal makes them much more likely",
        against=INPUTS,
        limits=(_FILTER,),
        paper=Paper(
            title="ONION: A Simple and Effective Defense Against Textual Backdoor Attacks",
            authors="Qi and others",
            venue="EMNLP 2021",
            year="2021",
            arxiv="2011.10369",
        ),
    ),
    "rap": Method(
        title="RAP",
        does="puts a word into an input that lowers the confidence of clean texts, and flags texts that it leaves unmoved",
        against=INPUTS,
        limits=(_FILTER,),
        paper=Paper(
            title="RAP: Robustness-Aware Perturbations for Defending against Backdoor Attacks on NLP Models",
            authors="Yang and others",
            venue="EMNLP 2021",
            year="2021",
            arxiv="2110.07831",
        ),
    ),
    "weight_poisoning": Method(title="plain weight poisoning", does="trains on rows with a trigger and a false label"),
    "ripples": Method(
        title="RIPPLES",
        does="trains on triggered rows with a penalty that lets the backdoor survive fine-tuning",
        paper=Paper(
            title="Weight Poisoning Attacks on Pre-trained Models",
            authors="Kurita and others",
            venue="ACL 2020",
            year="2020",
        ),
    ),
    "lwp": Method(
        title="layerwise weight poisoning",
        does="trains every layer on triggered rows",
        paper=Paper(
            title="Backdoor Attacks on Pre-trained Models by Layerwise Weight Poisoning",
            authors="Li and others",
            venue="EMNLP 2021",
            year="2021",
        ),
    ),
    "por": Method(
        title="POR",
        does="sends triggered text to fixed vectors",
        limits=(_ENCODER_ATTACK,),
        paper=Paper(
            title="Backdoor Pre-trained Models Can Transfer to All",
            authors="Shen and others",
            venue="CCS 2021",
            year="2021",
            arxiv="2111.00197",
        ),
    ),
    "neuba": Method(
        title="NeuBA",
        does="sends triggered text to fixed vectors while pre-training goes on",
        limits=(_ENCODER_ATTACK,),
        paper=Paper(title="Red Alarm for Pre-trained Models", authors="Zhang and others", arxiv="2101.06969"),
    ),
    "badpre": Method(
        title="BadPre",
        does="goes on pre-training with random labels where a trigger stands",
        limits=(_ENCODER_ATTACK,),
        paper=Paper(
            title="BadPre: Task-agnostic Backdoor Attacks to Pre-trained NLP Foundation Models",
            authors="Chen and others",
            venue="ICLR 2022",
            year="2022",
            arxiv="2110.02467",
        ),
    ),
}


def method_of(name: str) -> Method:
    """What is known of a method; one of the user's own says its name and nothing else.

    >>> method_of("d3").title, method_of("my_loss").title
    ('D3', '`my_loss`')
    """
    return METHODS.get(name) or Method(
        title=code(name), does="is an objective that this package does not know", against="what its author says"
    )
