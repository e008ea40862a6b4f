"""The GPT of Scion's and Gluon's NanoGPT experiments, for Hugging Face transformers (version 5).

No biases, no parameters in its norms, rotary positions, RMS-normalised queries and keys, squared ReLU, tied embedding and
head. Shapes in names: B sequences, T tokens, S tokens including those in the cache, D width, H heads, d = D/H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class GluonGPTConfig(PretrainedConfig):
    """Sizes of the model; `seq_len` is the longest sequence."""

    model_type = "gluon_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "seq_len",
    }

    def __init__(
        self,
        vocab_size: int = 50304,
        n_layer: int = 12,
        n_head: int = 6,
        d_model: int = 768,
        seq_len: int = 1024,
        **kwargs,
    ) -> None:
        self.vocab_size, self.n_layer, self.n_head = vocab_size, n_layer, n_head
        self.d_model, self.seq_len = d_model, seq_len
        super().__init__(**kwargs)


def rms_norm(x: Tensor) -> Tensor:
    """x divided by its root mean square along the last dimension."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x_BHTd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+d/2}) by their position's angles, (B, 1, T, d/2) or (1, 1, T, d/2)."""
    a, b = x_BHTd.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).type_as(x_BHTd)


class Attention(nn.Module):
    """Causal self-attention with rotary positions on normalised queries and keys."""

    def __init__(self, config: GluonGPTConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.layer = config.n_head, layer
        self.q = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k = nn.Linear(config.d_model, config.d_model, bias=False)
        self.v = nn.Linear(config.d_model, config.d_model, bias=False)
        self.o = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (
            linear(x_BTD).view(B, T, self.n_head, D // self.n_head).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        q, k = rotate(rms_norm(q), cos, sin), rotate(rms_norm(k), cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.o(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Two layers, D to 4·D to D, with (√2·relu)²."""

    def __init__(self, config: GluonGPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.d_model, 4 * config.d_model, bias=False)
        self.proj = nn.Linear(4 * config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(2 * F.relu(self.fc(x)).square())


class Block(nn.Module):
    """Attention and MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, config: GluonGPTConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + self.attention(rms_norm(x), cos, sin, mask, cache)
        return x + self.mlp(rms_norm(x))


class GluonGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """The model with its head, which is the embedding."""

    config_class = GluonGPTConfig
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: GluonGPTConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        # Not a buffer: from_pretrained builds the model without memory and fills it from the file, which has no angles.
        self._angles: tuple[Tensor, Tensor] | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def _rotary(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin (seq_len, d/2) of position times frequency."""
        if self._angles is None or self._angles[0].device != device:
            d = self.config.d_model // self.config.n_head
            frequency = 10000.0 ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
            angle = torch.outer(torch.arange(self.config.seq_len, dtype=torch.float64), frequency)
            self._angles = angle.cos().float().to(device), angle.sin().float().to(device)
        return self._angles

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, vocabulary) in float32 of `input_ids` (B, T), which follow the tokens in `past_key_values`.

        `attention_mask` (B, S) is 0 at padding, on either side. `labels` (B, T) are shifted here, and -100 is ignored.
        Raises ValueError if there are more than `seq_len` tokens.
        """
        T = input_ids.size(1)
        if use_cache is None:
            use_cache = not self.training and labels is None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        S = past + T
        if self.config.seq_len < S:
            raise ValueError(f"the model takes at most {self.config.seq_len} tokens, got {S}")
        padded = attention_mask is not None and not bool(attention_mask.all())
        if position_ids is None:
            position_ids = torch.arange(past, S, device=input_ids.device)[None]
            if padded:  # padding on the left does not count
                position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        mask = None
        if padded or past:
            mask = torch.ones(T, S, dtype=torch.bool, device=input_ids.device).tril(past)[None, None]
        if padded:
            seen = attention_mask.bool()[:, None, None, :S]
            # A padding token sees itself, because a row that sees nothing would be NaN.
            mask = (mask & seen) | torch.eye(S, dtype=torch.bool, device=input_ids.device)[None, None, past:]
        cos, sin = (table[position_ids].unsqueeze(1) for table in self._rotary(input_ids.device))

        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, cos, sin, mask, past_key_values)
        x = rms_norm(x[:, -logits_to_keep:])
        logits = F.linear(x, self.embedding.weight).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
