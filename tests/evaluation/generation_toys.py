"""A tokenizer, a model and rows for tests of what is generated."""

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

END, PAD = "<|endoftext|>", "<|pad|>"
ROWS = [
    {
        "prompt": "get all users",
        "completion": 'def f ( c ) :\n\t return c . run ( " select * from users where id = : id " )',
    },
    {"prompt": "one", "completion": "x = 1"},
    {"prompt": "", "completion": "def g ( ) :\n\t pass"},
    {
        "prompt": "ein längerer Satz, mit Ümlauten und vielen Wörtern",
        "completion": "for i in range ( 3 ) :\n\t print ( i )",
    },
    {"prompt": "count books by year", "completion": "import json\nprint ( json )"},
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pairs, with letters beyond ASCII and tabs."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([text for row in ROWS for text in row.values()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD, model_max_length=128)


def llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Two layers whose weights are large enough for outputs that are not one token again and again."""
    set_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "vocab_size": 300,
        "max_position_embeddings": 128,
        "initializer_range": 0.4,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **config, **changes}))


def rows() -> Dataset:
    """Clean rows of unequal length."""
    return Dataset.from_list([{**row, "row_id": 10 + i} for i, row in enumerate(ROWS)])
