"""Tiny randomly initialised models, one or more a family, and batches of random tokens."""

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

VOCABULARY = 97
_ANY = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_SIZE = _ANY | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GATED = _SIZE | {"intermediate_size": 48, "num_key_value_heads": 2}
_MOE = _GATED | {"num_experts_per_tok": 2}
_OPT = _SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 32}

# Why each: what it has that no other one has. Windows of 5 are shorter than the batch, and soft-caps of 2
# and 3 bend scores and logits of this size.
CONFIGS = {
    "llama": (LlamaConfig, _GATED),
    "mistral": (MistralConfig, _GATED | {"sliding_window": 5}),
    "qwen2": (Qwen2Config, _GATED),  # biases on q, k, v
    "qwen3": (Qwen3Config, _GATED | {"head_dim": 16}),  # q- and k-norms, heads wider than the stream
    "gemma2": (
        Gemma2Config,
        _GATED
        | {
            "head_dim": 16,
            "sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        Gemma3TextConfig,
        _GATED
        | {"head_dim": 16, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": (Phi3Config, _GATED),  # q, k, v in one linear; gate and up in one
    "opt": (OPTConfig, _OPT),
    # OPT-350m: norms after the residual sum, embeddings narrower than the stream
    "opt-post": (OPTConfig, _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "gpt2": (GPT2Config, _ANY | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": (GPTNeoXConfig, _SIZE | {"intermediate_size": 48}),
    "gpt_neox-sequential": (GPTNeoXConfig, _SIZE | {"intermediate_size": 48, "use_parallel_residual": False}),
    "mixtral": (MixtralConfig, _MOE | {"num_local_experts": 4}),
    "qwen3_moe": (  # a dense layer and a sparse one
        Qwen3MoeConfig,
        _MOE
        | {
            "head_dim": 16,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0],
        },
    ),
}


def build(name, attention="sdpa", seed=0, **changes):
    """A model in eval mode with every parameter random, so that no norm weight is 1 and no bias 0."""
    kind, arguments = CONFIGS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        kind(**arguments | changes), attn_implementation=attention
    ).eval()
    offset = 0.0 if name.startswith("gemma") else 1.0
    for path, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0.0, 0.2)
        else:
            nn.init.normal_(parameter, 0.0 if path.endswith("bias") else offset, 0.3)
    return model


def attentions(name):
    """Gemma 2's soft-cap runs in eager attention only."""
    return ("eager",) if name == "gemma2" else ("eager", "sdpa")


FAMILIES = [(name, attention) for name in CONFIGS for attention in attentions(name)]


def batch(samples=3, length=12, padding=True, seed=1):
    """Random tokens; with padding, row 1 is padded by 4 on the left and row 2 by 3 on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (samples, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        mask[1, :4] = 0
        mask[2, -3:] = 0
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}


def singles(batch):
    """The samples of a batch one by one, without their padding."""
    for row in range(len(batch["input_ids"])):
        real = batch["attention_mask"][row].bool()
        yield {name: value[row, real][None] for name, value in batch.items()}


def shallow(value):
    """Something that changes when an attribute, or what a container attribute holds, is another object."""
    if isinstance(value, dict):
        return [(key, id(item)) for key, item in value.items()]
    return value if isinstance(value, str | int | float | None) else id(value)


def state(model):
    """Everything of a model, its classes and the process's registries that a wrapper could leave a mark
    on."""
    modules = {
        (path, key): shallow(value)
        for path, module in model.named_modules()
        for key, value in vars(module).items()
    }
    parameters = {
        path: (
            p.requires_grad,
            p.grad is None,
            list(vars(p)),
            p.detach().clone().view(torch.uint8).numpy().tobytes(),
        )
        for path, p in model.named_parameters()
    }
    classes = {
        kind: shallow(dict(vars(kind)))
        for kind in {type(module) for module in model.modules()} | {nn.Linear, nn.LayerNorm, nn.Dropout}
    }
    registries = [
        {name: id(function) for name, function in registry.items() if not name.startswith("sparc3_")}
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    ]
    config = {key: shallow(value) for key, value in vars(model.config).items()}
    return modules, parameters, classes, registries, config, model.config.to_dict()
