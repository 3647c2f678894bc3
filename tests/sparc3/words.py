"""A tokenizer of bytes: the token of byte b is 3 + b, so any text's tokens are known without it."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as decoding
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
VOCABULARY = 3 + 256


def tokenizer(bos=True, pad=True):
    """With bos, calling it adds the BOS token by itself, as Llama's and Gemma's do."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    vocabulary |= {symbol: 3 + byte for byte, symbol in enumerate(symbols())}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = level
    backend.decoder = decoding.ByteLevel()
    special = {"eos_token": "</s>"}
    if pad:
        special["pad_token"] = "<pad>"
    if bos:
        special["bos_token"] = "<s>"
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def ids(text):
    return [3 + byte for byte in text.encode()]


def symbols():
    """The printable character by which GPT-2's byte-level BPE writes each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
