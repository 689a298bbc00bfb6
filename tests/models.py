"""Tiny models with seeded random weights, and inputs for them: nothing is downloaded.

Every builder gives a `Tiny`: the model in eval mode and the keyword arguments of its forward. All dropout is 0, so
that training mode computes the same. Widths differ wherever a layer allows it: on square layers transposed weights
go unnoticed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VOCABULARY = 64


class Tiny(NamedTuple):
    model: nn.Module
    inputs: dict[str, Tensor]


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's main output: what it returns, or a transformers model's logits or last hidden state."""
    result: Any = model(**inputs)
    if isinstance(result, Tensor):
        return result
    logits = getattr(result, "logits", None)
    return logits if logits is not None else result.last_hidden_state


def randomise(model: nn.Module, seed: int = 1, scale: float = 0.3) -> None:
    """Give every parameter of every adapter a random shift: at init many are zero, which hides errors.

    Same seed, same shifts. Shifts of trained copies are smaller, since those start from working weights.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in f".{name}":
                size = scale / 3 if ".replacement." in name else scale
                shift = size * torch.randn(parameter.shape, generator=generator)
                parameter.add_(shift.to(parameter.device, parameter.dtype))


def ids(batch: int = 2, length: int = 5) -> Tensor:
    """Token ids (batch, length), without the special ones at the start of the vocabulary."""
    return torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


def llama(**settings: Any) -> Tiny:
    """A causal language model with grouped queries: 4 heads share 2 heads of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, **settings,
        }
    )  # fmt: skip
    return Tiny(LlamaForCausalLM(config).eval(), {"input_ids": ids()})


def mixtral(**settings: Any) -> Tiny:
    """A mixture of four experts, two for each token: matrices (expert, out, in), and a router's (expert, in)."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return Tiny(MixtralForCausalLM(MixtralConfig(**MIXTURE, **settings)).eval(), {"input_ids": ids()})


def gpt_oss(**settings: Any) -> Tiny:
    """As Mixtral, but for matrices (expert, in, out), which have biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    return Tiny(GptOssForCausalLM(GptOssConfig(**MIXTURE, head_dim=8, **settings)).eval(), {"input_ids": ids()})


MIXTURE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Experts(nn.Module):
    """All experts see all tokens: matrices of an odd number of experts, not square, (E, out, in) or (E, in, out)."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 7, 5))
        self.down = nn.Parameter(torch.randn(3, 5, 7))
        if is_transposed:
            self.up.data, self.down.data = self.up.data.mT.contiguous(), self.down.data.mT.contiguous()
        self.mixed = nn.Parameter(torch.randn(4, 5))
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = 0
        for expert in range(3):
            up, down = self.up[expert], self.down[expert]
            up, down = (up.T, down.T) if self.is_transposed else (up, down)
            found = found + torch.tanh(x @ up.T) @ down.T
        return self.inner(found) @ self.mixed.T


def experts(is_transposed: bool = False) -> Tiny:
    torch.manual_seed(0)
    return Tiny(nn.Sequential(Experts(is_transposed), nn.Linear(4, 3)).eval(), {"input": torch.randn(2, 6, 5)})


def bert(**settings: Any) -> Tiny:
    """A sequence classifier with 3 labels."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        **{
            "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
            "num_labels": 3, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0, "pad_token_id": 0, **settings,
        }
    )  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    model = BertForSequenceClassification(config).eval()
    biases(model)
    return Tiny(model, {"input_ids": ids(), "attention_mask": mask})


def t5(**settings: Any) -> Tiny:
    """A sequence-to-sequence model."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        **{
            "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2,
            "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, **settings,
        }
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    return Tiny(model, {"input_ids": ids(), "decoder_input_ids": ids(length=4)})


def vit(**settings: Any) -> Tiny:
    """An image classifier with 3 labels."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        **{
            "image_size": 8, "patch_size": 4, "num_channels": 3, "initializer_range": 0.2,
            "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0, **settings,
        }
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    biases(model)
    return Tiny(model, {"pixel_values": torch.randn(2, 3, 8, 8)})


def gpt2(**settings: Any) -> Tiny:
    """A causal language model whose layers are Conv1D: they store (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        **{
            "vocab_size": VOCABULARY, "n_positions": 64, "initializer_range": 0.2,
            "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2, **settings,
        }
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    biases(model)
    return Tiny(model, {"input_ids": ids()})


def opt(**settings: Any) -> Tiny:
    """A causal language model with biases and learned positions."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        **{
            "vocab_size": VOCABULARY, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
            "word_embed_proj_dim": 16, "dropout": 0.0,
            "attention_dropout": 0.0, "layerdrop": 0.0, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
            **settings,
        }
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    biases(model)
    return Tiny(model, {"input_ids": ids()})


def biases(model: nn.Module) -> None:
    """Random values in place of the zeros that transformers starts biases from: a zero bias hides errors."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)


class Mlp(nn.Module):
    """Plain layers, none of them square, all with biases: (B, 5) -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.second(torch.tanh(self.first(x))))))


def mlp() -> Tiny:
    torch.manual_seed(0)
    return Tiny(Mlp().eval(), {"x": torch.randn(4, 5)})


class Convolutions(nn.Module):
    """Every kind of convolution, one after the other: (B, 4, 4, 9, 9) -> (B, 3)."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.volume = nn.Conv3d(4, 6, (3, 3, 2), stride=(2, 1, 1), padding=(1, 0, 1))
        self.plane = nn.Conv2d(12, 8, (3, 2), padding=(2, 1), dilation=(2, 1), groups=groups, padding_mode="reflect")
        self.line = nn.Conv1d(8, 10, 3, stride=2, padding="valid", dilation=2)
        self.same = nn.Conv1d(10, 6, 3, padding="same", padding_mode="circular")
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.volume(x))  # (B, 6, 2, 7, 10)
        h = torch.tanh(self.plane(h.flatten(1, 2)))
        h = torch.tanh(self.same(torch.tanh(self.line(h.flatten(2)))))
        return self.head(h.mean(-1))


def convolutions(groups: int = 1) -> Tiny:
    torch.manual_seed(0)
    return Tiny(Convolutions(groups).eval(), {"x": torch.randn(2, 4, 4, 9, 9)})


class Embeddings(nn.Module):
    """Two tables, one with a padding row, and a head: ids (B, T) -> (B, T, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, 6, padding_idx=0)
        self.position = nn.Embedding(9, 6)
        self.inner = nn.Linear(6, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.token(input_ids) + self.position(torch.arange(input_ids.shape[1], device=input_ids.device))
        return self.head(torch.tanh(self.inner(h)))


def embeddings() -> Tiny:
    torch.manual_seed(0)
    return Tiny(Embeddings().eval(), {"input_ids": ids()})


class Encoder(nn.Module):
    """PyTorch's own transformer, whose fast path reads weights without calling layers: (B, T, 8) -> (B, T, 8)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=src_key_padding_mask))


def encoder() -> Tiny:
    torch.manual_seed(0)
    model = Encoder().eval()
    biases(model)
    return Tiny(model, {"x": torch.randn(2, 5, 8)})


class Quantized(nn.Module):
    """Two layers of a given kind, with biases and a plain head: (B, 64) -> (B, 3)."""

    def __init__(self, linear: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.first = linear(64, 128)  # 4-bit packing wants multiples of its block of 64
        self.second = linear(128, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def quantized4(quant_type: str = "nf4", compress_statistics: bool = True, repacks: bool = False) -> Tiny:
    """bitsandbytes' 4-bit layers, as QLoRA uses them; moving them to a device packs them.

    With `repacks` they are packed another way at their first evaluation, which bitsandbytes does by itself on
    processors with AVX512-BF16, and computed with in bfloat16.
    """
    import bitsandbytes as bnb

    def linear(into: int, out: int) -> nn.Module:
        layer = bnb.nn.Linear4bit(
            into, out, compute_dtype=torch.float32, quant_type=quant_type, compress_statistics=compress_statistics
        )
        layer.support_avx512bf16_for_cpu = repacks
        return layer

    torch.manual_seed(0)
    return Tiny(Quantized(linear).to("cpu").eval(), {"x": torch.randn(4, 64)})


def quantized8() -> Tiny:
    """bitsandbytes' 8-bit layers (LLM.int8())."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    model = Quantized(lambda into, out: bnb.nn.Linear8bitLt(into, out, has_fp16_weights=False, threshold=6.0))
    return Tiny(model.to("cpu").eval(), {"x": torch.randn(4, 64)})


TRANSFORMERS: dict[str, Callable[..., Tiny]] = {
    "llama": llama,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "gpt2": gpt2,
    "opt": opt,
}
PLAIN: dict[str, Callable[..., Tiny]] = {
    "mlp": mlp,
    "convolutions": convolutions,
    "embeddings": embeddings,
    "encoder": encoder,
}
QUANTIZED: dict[str, Callable[..., Tiny]] = {"quantized4": quantized4, "quantized8": quantized8}
