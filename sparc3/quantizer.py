"""How transformers finds packed weights: quant_method "sparc3" in config.json (docs/formats.md).

sparc3.registration imports this once transformers' registries are there. Nothing of transformers is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from sparc3_kernels.native import HUGE_PAGE, drop_mapped_pages, huge_empty
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparc3.errors import InputError

METHOD = "sparc3"
VERSION = 1


@register_quantization_config(METHOD)
class Sparc3Config(QuantizationConfigMixin):
    """The quantization_config of a model with packed weights.

    Args:
        modules: {path of a linear in the model: its entry, see sparc3.runtime.Packing}.
        version: of the format.

    Raises:
        InputError: another version, or entries that cannot be read.
    """

    def __init__(
        self, modules: dict[str, Any] | None = None, version: int = VERSION, quant_method: str = METHOD
    ) -> None:
        from sparc3.runtime import Packing

        if version != VERSION:
            raise InputError(
                f"the model is packed in version {version!r} of the sparc3 format, and this one reads version "
                f"{VERSION}: update sparc3"
            )
        if not isinstance(modules, dict):
            raise InputError("config.json is damaged: its quantization_config has no modules, by their names")
        self.quant_method: Any = quant_method
        self.version = version
        self.modules = {name: Packing.read(name, entry).entry() for name, entry in modules.items()}


@register_quantizer(METHOD)
class Sparc3Quantizer(HfQuantizer):
    """Puts SparseLinear modules where config.json lists them, and checks what the files hold."""

    quantization_config: Any

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        from sparc3.runtime import DTYPES

        if dtype not in DTYPES:
            raise InputError(f"packed weights run in {', '.join(map(str, DTYPES))}, not {dtype}")
        return dtype

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from sparc3.runtime import FORMATS, Packing

        packings = {
            name: Packing.read(name, entry) for name, entry in self.quantization_config.modules.items()
        }
        check_files(kwargs.get("checkpoint_files") or (), packings)
        # A base model without its head has the same modules without the first name.
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        found = dict(model.named_modules())
        for name, packing in packings.items():
            path = name if name in found else name.removeprefix(prefix)
            old = found.get(path)
            if old is None:
                if path == name and "." not in name:  # the head, which a base model does not have
                    continue
                raise InputError(f"config.json lists a packed {name}, and the model has no such module")
            weight = old.weight
            shape = tuple(weight.shape[::-1] if packing.transposed else weight.shape)
            if shape != packing.shape:
                raise InputError(
                    f"config.json says that {name} is {list(packing.shape)}, and the model's is {list(shape)}"
                )
            sparse = FORMATS[packing.format](packing, old.bias is not None, name, weight.dtype, "meta")
            model.set_submodule(path, sparse)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from sparc3.runtime import SparseLinear

        for module in model.modules():
            if isinstance(module, SparseLinear):
                move_to_huge_pages(module)
                module.arrange()

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Every packed linear becomes an nn.Linear again (also what was a Conv1D)."""
        from sparc3.runtime import SparseLinear

        for path, module in list(model.named_modules()):
            if isinstance(module, SparseLinear):
                linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta")
                linear.weight = nn.Parameter(module.dense().to(dtype), requires_grad=False)
                linear.bias = module.bias
                model.set_submodule(path, linear)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def move_to_huge_pages(module: nn.Module) -> None:
    """Copy the module's own large CPU tensors to memory in 2 MB pages, where the system grants them.

    Tensors as loaded may lie in the mapped file, with pages of 4 kB, and decoding reads all of them for each token.
    Copied pages of the file leave memory at once: the mapping lives as long as any dense weight lies in it, and would
    hold the packed weights a second time.
    """
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.device.type == "cpu" and tensor.nbytes >= HUGE_PAGE:
            loaded = tensor.data
            tensor.data = huge_empty(tensor.shape, tensor.dtype).copy_(loaded)
            drop_mapped_pages(loaded)


def check_files(files: Iterable[str | Path], packings: dict[str, Any]) -> None:
    """InputError naming the weight unless the safetensors files hold every packed weight whole and undamaged.

    transformers fills what is missing with random numbers and takes any shape for a quantised weight, so this is read
    beforehand: the places of all values, not the values.
    """
    from sparc3.runtime import check_packed

    where: dict[str, Any] = {}
    for file in files:
        if str(file).endswith(".safetensors"):
            opened = _opened(file)
            where |= dict.fromkeys(opened.keys(), opened)
    if not where:
        return
    for name, packing in packings.items():
        keys = {part: f"{name}.{part}" for part in packing.layout()}
        tensors = {part: where[key].get_tensor(key) for part, key in keys.items() if key in where}
        check_packed(name, packing, tensors)


def _opened(file: str | Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise InputError(
            f"{file} is a damaged or incomplete safetensors file ({error}); fetch or export it again"
        ) from error
