"""What diffusers' tests take from the hub, made here: tokenizers of single characters, small configurations.

Only names are looked at that these tests use. What is missing is no model to try, and its pipeline is told as not run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from tokenizers.pre_tokenizers import ByteLevel

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()<>|_-\n"
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def clip() -> Any:
    """Of single characters, with CLIP's two special tokens."""
    words = ["<|startoftext|>", "<|endoftext|>", *(c + end for c in LETTERS for end in ("", "</w>"))]
    directory = Path(tempfile.mkdtemp())
    (directory / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    files = (str(directory / "vocab.json"), str(directory / "merges.txt"))
    more = {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "model_max_length": 77}
    return transformers.CLIPTokenizer(*files, **more)


def t5() -> Any:
    """Pieces of one character."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)


def qwen2() -> Any:
    """Bytes, and the marks of a chat with images."""
    vocab = {c: number for number, c in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    return transformers.Qwen2Tokenizer(vocab, [], chat_template=CHAT, additional_special_tokens=MARKS)


def _bpe(kind: Any, *special: str) -> Callable[[], Any]:
    words = [*special, "▁", *(c for c in LETTERS if not c.isspace())]
    vocab = {word: number for number, word in enumerate(words)}
    return lambda: kind(vocab, [], chat_template=CHAT, pad_token="<pad>")


def bert() -> Any:
    """Words of one character."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS.lower(), *(f"##{c}" for c in LETTERS.lower())]
    return transformers.BertTokenizer({word: number for number, word in enumerate(dict.fromkeys(words))})


gemma = _bpe(transformers.GemmaTokenizer, "<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
llama = _bpe(transformers.LlamaTokenizer, "<unk>", "<s>", "</s>", "<pad>")

_T5 = {"vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
_BERT = {"vocab_size": 1124, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "tiny-random-clip": clip,
    "tiny-random-t5": t5,
    "tiny-random-T5Model": t5,
    "tiny-random-umt5": t5,
    "tiny-random-Qwen2VLForConditionalGeneration": qwen2,
    "dummy-gemma": gemma,
    "dummy-hunyaunvideo": llama,
    "llama-tokenizer": llama,
    "tiny-random-LlamaForCausalLM": llama,
    "tiny-random-BertModel": bert,
    "tiny-random-roberta": clip,
    "tiny-random-mclip-base": t5,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "tiny-random-t5": lambda: transformers.T5Config(**_T5),
    "tiny-random-umt5": lambda: transformers.UMT5Config(**_T5),
    "tiny-random-BertModel": lambda: transformers.BertConfig(**_BERT, intermediate_size=37),
}


def made_here() -> None:
    """Have `from_pretrained` of transformers give these by the hub's names; every other name as before."""
    for kind in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerBase):
        _replace(kind, lambda _, name: TOKENIZERS.get(name), "model_max_length")
    _replace(transformers.AutoConfig, lambda _, name: CONFIGS.get(name))
    _replace(transformers.PreTrainedModel, _model)


def _model(kind: Any, name: str) -> Callable[[], Any] | None:
    return (lambda: kind(CONFIGS[name]()).eval()) if name in CONFIGS else None


def _replace(kind: Any, find: Callable[[Any, str], Callable[[], Any] | None], *settings: str) -> None:
    own = kind.from_pretrained.__func__

    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        make = None if Path(str(name)).exists() else find(cls, str(name).rpartition("/")[2])
        if make is None:
            return own(cls, name, *args, **kwargs)
        made = make()
        for setting in settings:
            if setting in kwargs:
                setattr(made, setting, kwargs[setting])
        return made

    kind.from_pretrained = classmethod(from_pretrained)
