"""Models whose code comes with them, as a hub repository has them: the two kinds of baselines that exist only so.

`LTG` is as LTG-BERT and GPT-BERT are: the masked LM inherits the encoder, attention has its own relative positions in
a buffer and an in-place softmax, special tokens get minus infinity, weights are tied by hand, without `post_init`.
`NEO` is as NeoBERT is, with a tokenizer of its own: rotary positions as complex numbers in a buffer that is not saved,
a head that calls `model.forward`, RMSNorm and SwiGLU, `max_length` in place of `max_position_embeddings`. Both have
`pytorch_model.bin`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}

LTG_CONFIG = """
from transformers import PretrainedConfig

class LtgConfig(PretrainedConfig):
    model_type = "ltg"

    def __init__(self, vocab_size=600, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                 max_position_embeddings=64, position_buckets=8, **rest):
        super().__init__(**rest)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.intermediate_size = num_attention_heads, intermediate_size
        self.max_position_embeddings, self.position_buckets = max_position_embeddings, position_buckets
"""

LTG_MODEL = """
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from .configuration_ltg import LtgConfig

Path({canary!r}).touch()

class MaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(context, scores, mask, dim):
        scores.masked_fill_(mask, float("-inf"))
        scores = scores.softmax(dim)
        scores.masked_fill_(mask, 0.0)
        context.save_for_backward(scores)
        return scores

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.in_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, elementwise_affine=False)
        places = torch.arange(config.max_position_embeddings)
        distances = (places[:, None] - places[None]).clamp(1 - config.position_buckets, config.position_buckets - 1)
        self.register_buffer("position_indices", distances + config.position_buckets - 1, persistent=True)

    def forward(self, states, mask, relative):  # seq first
        length, batch, _ = states.shape
        query, key, value = self.in_proj(self.norm(states)).chunk(3, dim=-1)
        query, key, value = (
            part.reshape(length, batch, self.heads, self.width).permute(1, 2, 0, 3) for part in (query, key, value)
        )
        _, key_pos, _ = self.in_proj(relative).chunk(3, dim=-1)
        key_pos = key_pos.view(-1, self.heads, self.width)
        scores = query @ key.transpose(2, 3)
        indices = self.position_indices[:length, :length].expand(batch, self.heads, -1, -1)
        scores.add_(torch.einsum("bhqd,khd->bhqk", query, key_pos).gather(3, indices))
        probabilities = MaskedSoftmax.apply(scores * (2 * self.width) ** -0.5, mask, -1)
        return self.out_proj((probabilities @ value).permute(2, 0, 1, 3).flatten(2))

class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.mlp = nn.Sequential(
            nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, config.intermediate_size), nn.GELU(),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )

    def forward(self, states, mask, relative):
        states = states + self.attention(states, mask, relative)
        return states + self.mlp(states)

class LtgModel(PreTrainedModel):
    config_class = LtgConfig

    def _init_weights(self, module):
        pass

    def __init__(self, config, add_mlm_layer=False):
        Path({canary!r}).touch()
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.relative = nn.Parameter(torch.randn(2 * config.position_buckets - 1, config.hidden_size))
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        if add_mlm_layer:
            self.classifier = nn.Sequential(
                nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, config.hidden_size), nn.GELU(),
                nn.Linear(config.hidden_size, config.vocab_size),
            )
            self.classifier[-1].weight = self.embedding.weight

    def encode(self, input_ids, attention_mask):
        mask = ~attention_mask.bool()[:, None, None]
        states = self.embedding(input_ids.t())
        for layer in self.layers:
            states = layer(states, mask, self.relative)
        return states.transpose(0, 1)

    def forward(self, input_ids=None, attention_mask=None, return_dict=None, **rest):
        states = self.encode(input_ids, attention_mask)
        return BaseModelOutput(last_hidden_state=states) if return_dict is not False else (states,)

class LtgForMaskedLM(LtgModel):
    def __init__(self, config):
        super().__init__(config, add_mlm_layer=True)

    def get_output_embeddings(self):
        return self.classifier[-1].weight

    def forward(self, input_ids=None, attention_mask=None, return_dict=None, labels=None, **rest):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        logits = self.classifier(self.encode(input_ids, attention_mask))
        logits[:, :, :5] = float("-inf")
        return MaskedLMOutput(logits=logits) if return_dict else (logits,)
"""

NEO_MODEL = """
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

class NeoConfig(PretrainedConfig):
    model_type = "neo"

    def __init__(self, vocab_size=600, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                 max_length=64, **rest):
        super().__init__(**rest)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.intermediate_size = num_attention_heads, intermediate_size
        self.max_length = max_length

def frequencies(width, end):
    inverse = 10000.0 ** (-torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(end), inverse).float()
    return torch.polar(torch.ones_like(angles), angles)

def turn(states, table):
    pairs = torch.view_as_complex(states.float().reshape(*states.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table.contiguous().unsqueeze(2)).flatten(3).type_as(states)

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.w12 = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(config.hidden_size), nn.RMSNorm(config.hidden_size)

    def forward(self, x, mask, table):
        heads = self.config.num_attention_heads
        query, key, value = self.qkv(self.attention_norm(x)).view(*x.shape[:2], heads, -1).chunk(3, axis=-1)
        query, key = turn(query, table), turn(key, table)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask.bool()).transpose(1, 2)
        x = x + self.wo(attended.reshape(x.shape))
        gate, up = self.w12(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.w3(silu(gate) * up)

class NeoPreTrained(PreTrainedModel):
    config_class = NeoConfig
    base_model_prefix = "model"

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.uniform_(-0.02, 0.02)

class Neo(NeoPreTrained):
    def __init__(self, config):
        super().__init__(config)
        self.encoder = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        width = config.hidden_size // config.num_attention_heads
        self.register_buffer("freqs_cis", frequencies(width, config.max_length), persistent=False)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.layer_norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **rest):
        mask = attention_mask.unsqueeze(1).unsqueeze(1)
        mask = mask.repeat(1, self.config.num_attention_heads, attention_mask.size(-1), 1)
        x, table = self.encoder(input_ids), self.freqs_cis[: input_ids.shape[1]].unsqueeze(0)
        for layer in self.layers:
            x = layer(x, mask, table)
        return BaseModelOutput(last_hidden_state=self.layer_norm(x))

class NeoLMHead(NeoPreTrained):
    def __init__(self, config):
        super().__init__(config)
        self.model = Neo(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **rest):
        output = self.model.forward(input_ids=input_ids, attention_mask=attention_mask)
        return MaskedLMOutput(logits=self.decoder(output.last_hidden_state))
"""

NEO_TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class NeoTokenizer(PreTrainedTokenizerFast):
    pass
"""

CODE = {
    "ltg": {"configuration_ltg.py": LTG_CONFIG, "modeling_ltg.py": LTG_MODEL},
    "neo": {"model.py": NEO_MODEL, "tokenization_neo.py": NEO_TOKENIZER},
}
AUTO_MAP = {
    "ltg": {"AutoConfig": "configuration_ltg.LtgConfig", "AutoModelForMaskedLM": "modeling_ltg.LtgForMaskedLM"},
    "neo": {"AutoConfig": "model.NeoConfig", "AutoModelForMaskedLM": "model.NeoLMHead"},
}


def write_model(kind: str, folder: Path, tokenizer: Path, canary: Path) -> Any:
    """Write a checkpoint of the kind, with random weights, and return the network. Its code makes the file `canary`."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    shutil.copytree(tokenizer, folder)
    for name, code in CODE[kind].items():
        (folder / name).write_text(code.replace("{canary!r}", repr(str(canary))))
    settings = {"model_type": kind, "vocab_size": 600, "auto_map": AUTO_MAP[kind], **SIZES}
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer_settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": 1 << 40}
    if kind == "neo":
        own_class = {"AutoTokenizer": [None, "tokenization_neo.NeoTokenizer"]}
        tokenizer_settings |= {"tokenizer_class": "NeoTokenizer", "auto_map": own_class}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_settings))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    network = AutoModelForMaskedLM.from_config(config, trust_remote_code=True).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(6 if kind == "neo" and parameter.ndim > 1 else 1)  # sharp predictions
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    canary.unlink(missing_ok=True)
    return network
