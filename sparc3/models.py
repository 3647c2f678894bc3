"""Loading a model and its tokenizer from a folder, the hub, a GGUF file or the bundled ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, errors, snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken
from tokenizers.models import BPE
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sparc3.errors import InputError
from sparc3.families import declared

DEFAULT = "tiny-llama"
BUNDLED = (DEFAULT, "tiny-opt")
DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# What is to be said beside a model's figures; it goes on to what is made of the model.
NOTE_FILE = "sparc3_note.txt"
# The hub is asked once before transformers is, which tries for 23 s when there is no network.
_HUB_TIMEOUT_S = 10
# Bytes; where torch's allocator puts tensors.
_ALIGNED = 64


@dataclass(frozen=True)
class Loaded:
    """A model ready to be read.

    Attributes:
        model: in eval mode, its config as on disk (pass ``use_cache=False`` where no cache is wanted).
        tokenizer: the checkpoint's own.
        name: what was asked for.
        origin: the folder, GGUF file or hub id that it came from.
        note: to be said beside every figure, as "dequantised from GGUF Q4_1"; empty for most models.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    origin: str
    note: str = ""


def load(name: str | Path | None = None, *, dtype: str = "float32", device: str = "cpu") -> Loaded:
    """Load a causal language model with its tokenizer.

    Args:
        name: a folder, a hub id, a ``.gguf`` file (converted once into the cache folder) or a bundled model
            (``BUNDLED``); None is ``DEFAULT``. A bundled name wins over a folder of that name (write ./NAME).
        dtype: one of ``DTYPES``; "auto" keeps the checkpoint's.
        device: a torch device, as "cpu" or "cuda:0".

    Raises:
        InputError: nothing is there, the architecture is not declared (see sparc3.families), a file is missing or
            damaged, weights are missing, of the wrong shape, NaN or Inf, there is no tokenizer, the hub does not
            answer, or dtype or device is not usable.
    """
    name = str(DEFAULT if name is None else name)
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not known; use {' | '.join(DTYPES)}")
    where = usable_device(device)
    source, note = resolve(name)
    with _unreadable(f"{name}: transformers cannot load this model"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    # Before the weights, which may take minutes to fetch and to read.
    declared(config.model_type)
    with _unreadable(f"{name}: transformers cannot load this model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, info = loaded
    # transformers fills what is missing with random numbers and only warns.
    if info["missing_keys"]:
        raise InputError(f"{name}: the checkpoint lacks {_some(info['missing_keys'])}; it is incomplete")
    check_finite(model, name)
    _align(model)
    return Loaded(model.to(where).eval(), load_tokenizer(source, name), name, name if note else source, note)


def load_tokenizer(source: str | Path, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; InputError where there is none."""
    with _unreadable(f"{name}: no usable tokenizer (tokenizer.json or tokenizer.model beside config.json)"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        return tokenizer


def local_folder(name: str, weights: bool = True) -> tuple[Path, str]:
    """(folder with the checkpoint, note) of a name as ``load`` takes it; a hub id is fetched first.

    Args:
        weights: False is content with a config.json.
    """
    path = Path(name).expanduser()
    if name not in BUNDLED and (path / "config.json").is_file():
        # sparc3.checkpoint looks at the weights, and without mapping them.
        return path, _note_in(path)
    source, note = resolve(name)
    if not Path(source).is_dir():
        wanted = ["*.json", "*.model", "*.txt", *(["*.safetensors"] if weights else [])]
        with _unreadable(f"{name}: the hub does not give its files"):
            source = snapshot_download(source, allow_patterns=wanted)
    return Path(source), note


def _align(model: nn.Module) -> None:
    """Give weights that lie at odd places of a mapped file memory of their own.

    Products with one token differ in the last bit by where the weight begins, so that a model would not give the
    same relevance however it was loaded.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % _ALIGNED:
            parameter.data = parameter.data.clone()


def resolve(name: str) -> tuple[str, str]:
    """(folder or hub id, note) of a name; InputError where there is nothing to load."""
    path = Path(name).expanduser()
    if name in BUNDLED:
        path = Path(__file__).parent / "bundled" / name
    elif path.suffix.lower() == ".gguf":
        path = convert_gguf(path)
    elif not path.exists():
        _check_hub(name)
        return name, ""
    _check_folder(path)
    return str(path), _note_in(path)


def _note_in(folder: Path) -> str:
    note = folder / NOTE_FILE
    return note.read_text(encoding="utf-8") if note.is_file() else ""


def check_finite(model: nn.Module, origin: str = "model") -> None:
    """InputError naming the parameters and buffers of a model that hold NaN or Inf."""
    bad = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if bad:
        raise InputError(
            f"{origin}: NaN or Inf in {_some(bad)}; the checkpoint is damaged or overflows this dtype"
        )


def cache_dir() -> Path:
    """Folder for what can be made again: $SPARC3_CACHE, else ``sparc3`` in the user's cache folder."""
    if chosen := os.environ.get("SPARC3_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sparc3"


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def convert_gguf(path: Path) -> Path:
    """Folder of the fp32 model that a GGUF file dequantises to, made once per content in the cache folder.

    The weights are the dequantised ones to the last bit (fp32 safetensors); the tokenizer is saved with them.

    Raises:
        InputError: no such file, not GGUF, an architecture that transformers cannot read, or no ``gguf``.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such GGUF file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file (it does not begin with the letters GGUF)")
    folder = cache_dir() / "gguf" / file_sha256(path)
    if folder.is_dir():
        return folder
    try:
        from gguf import GGUFReader, LlamaFileType
    except ImportError as error:
        raise InputError(f"{path}: reading GGUF needs a package more: pip install 'sparc3[gguf]'") from error
    with _unreadable(f"{path}: transformers cannot read this GGUF file"):
        fields = GGUFReader(path).fields
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        if _is_misread_gemma(tokenizer):
            tokenizer = _gemma_tokenizer(
                fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents()
            )
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        # A type of file that this gguf does not know yet is a ValueError, and its weights would be too.
        kind = LlamaFileType(fields["general.file_type"].contents()).name
    note = f"dequantised from GGUF {kind.removeprefix('MOSTLY_').removeprefix('ALL_')}"
    # The weights are plain fp32 now; left in, these would refuse the saving or ask for the GGUF file again.
    model.hf_quantizer = None  # type: ignore[assignment]
    model.config.__dict__.pop("quantization_config", None)
    try:
        with _beside(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            (partial / NOTE_FILE).write_text(note, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder}: cannot write the converted model ({error}); set SPARC3_CACHE to a folder with space"
        ) from error
    return folder


def _is_misread_gemma(tokenizer: PreTrainedTokenizerBase) -> bool:
    """transformers up to some version after 5.9 reads Gemma's BPE out of a GGUF file as a unigram model."""
    return isinstance(tokenizer, GemmaTokenizer) and not isinstance(tokenizer.backend_tokenizer.model, BPE)


def _gemma_tokenizer(tokens: list[str], types: list[int]) -> PreTrainedTokenizerBase:
    """Gemma's tokenizer from the vocabulary of a GGUF file and the kinds of its tokens.

    The file has no merges, and unlike elsewhere the scores do not follow their order; the tokens' own does.
    Runs of spaces are written as such, while the tokenizer looks them up as U+2581.
    """
    spelled = [token.replace(" ", "\u2581") if token.isspace() else token for token in tokens]
    vocabulary = {token: index for index, token in enumerate(spelled)}
    merges: Any = [
        (token[:cut], token[cut:])
        for token in spelled
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    # gguf.TokenType: 3 is control, 4 user-defined; both are matched whole.
    for kind, special in ((3, True), (4, False)):
        whole = [
            AddedToken(token, normalized=False, special=special)
            for token, its_kind in zip(tokens, types, strict=True)
            if its_kind == kind and token in vocabulary
        ]
        tokenizer.add_tokens(whole, special_tokens=special)
    return tokenizer


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A new folder that takes the given name once everything is in it, and is gone if anything fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        yield partial
        # Another process may have been quicker; both made the same.
        if not folder.is_dir():
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _unreadable(what: str) -> Iterator[None]:
    try:
        yield
    # For a bad file transformers and gguf raise nearly every class, and tokenizers plain Exception.
    except Exception as error:
        raise InputError(f"{what}: {error}") from error


def usable_device(device: str) -> torch.device:
    """A device by its name; InputError where it cannot be used."""
    try:
        # Only an allocation tells whether the device is really there.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def check_there(name: str) -> None:
    """InputError unless a bundled model, a file, a folder or the hub has this name; nothing is read."""
    if name not in BUNDLED and not Path(name).expanduser().exists():
        resolve(name)


def _check_hub(name: str) -> None:
    """InputError unless the hub, or its copy on this machine, has a model of this name."""
    missing = f"{name}: no such folder here"
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
    except errors.HFValidationError as error:
        raise InputError(f"{missing}, and it cannot be a hub id (OWNER/NAME)") from error
    except errors.GatedRepoError as error:
        raise InputError(
            f"{missing}; the hub asks for a login with access: accept its terms, `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(f"{missing}, and the hub has no public model of this name") from error
    # The transport's own exception class differs between versions of huggingface_hub (requests, httpx).
    except Exception as error:
        raise InputError(
            f"{missing}; as a hub id it needs the network, and the hub cannot be reached: {error}"
        ) from error


def _check_folder(folder: Path) -> None:
    """InputError naming the file that is missing or damaged."""
    if not folder.is_dir():
        raise InputError(
            f"{folder}: a model is a folder, a .gguf file, a hub id or one of {', '.join(BUNDLED)}"
        )
    config = folder / "config.json"
    if not config.is_file():
        other = " (it has a .gguf file: name that file)" if next(folder.glob("*.gguf"), None) else ""
        raise InputError(f"{folder}: no config.json in this folder{other}")
    with _unreadable(f"{config}: not a JSON file"):
        json.loads(config.read_text(encoding="utf-8"))
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        raise InputError(f"{folder}: no weights in this folder ({' or '.join(_WEIGHTS)})")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file}: damaged or incomplete safetensors file ({error}); fetch it again"
            ) from error


def _some(names: set[str] | list[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")
