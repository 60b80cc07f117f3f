"""MetaLA and SpikeGPT by their authors' equations, token by token in plain torch, over the released tensors."""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, logsigmoid, pad, relu, sigmoid, silu


def simple_rms_norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def metala_mixer(t: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    """S_t = a_t S_{t-1} + (1 - a_t) v_t; o_t = q_t S_t + sigmoid((q_t . (w (1 - a_t))) v_t) (arXiv 2411.10741, A3)."""
    taps = t[f"{name}.conv1d.weight"].squeeze(1)
    rows = pad(x, (0, 0, taps.shape[1] - 1, 0)).unfold(1, taps.shape[1], 1)
    x = silu((rows * taps).sum(-1))
    gate = silu(linear(x, t[f"{name}.g_proj.weight"], t[f"{name}.g_proj.bias"]))
    q, a, v = (
        linear(x, t[f"{name}.{part}.weight"]).unflatten(-1, (heads, -1)) for part in ("q_proj", "k_gate", "v_proj")
    )
    a = (logsigmoid(a) / 16).exp()
    balance = t[f"{name}.aug_balance"].view(heads, -1)
    state, outputs = torch.zeros(1), []
    for i in range(x.shape[1]):
        state = a[:, i, :, :, None] * state + (1 - a[:, i])[..., None] * v[:, i, :, None]
        read = torch.einsum("bhk,bhkv->bhv", q[:, i] * q.shape[-1] ** -0.5, state)
        own = (q[:, i] * balance * (1 - a[:, i])).sum(-1, keepdim=True)
        outputs.append(read + sigmoid(own * v[:, i]))
    out = layer_norm(torch.stack(outputs, 1), v.shape[-1:], eps=1e-5)
    return linear(out.flatten(2) * gate, t[f"{name}.out_proj.weight"])


def metala(t: dict[str, Tensor], layers: int, heads: int, ids: Tensor) -> Tensor:
    """`ids [B, T]` -> logits `[B, T, vocabulary]`."""
    x = t["model.embed_tokens.weight"][ids]
    for layer in range(layers):
        name = f"model.layers.{layer}"
        x = x + metala_mixer(t, f"{name}.token_mixer", simple_rms_norm(x), heads)
        l1, l2, l3 = (t[f"{name}.channel_mixer.l{i}.weight"] for i in (1, 2, 3))
        y = simple_rms_norm(x)
        x = x + linear(silu(linear(y, l1)) * linear(y, l2), l3)
    return linear(simple_rms_norm(x), t["model.embed_tokens.weight"])


def fire(x: Tensor) -> Tensor:
    """LIF over tokens: h_t = v + (x_t - v) / 2, a spike and a reset to 0 where h_t reaches 1 (arXiv 2302.13939)."""
    membrane, spikes = torch.zeros_like(x[:, 0]), []
    for i in range(x.shape[1]):
        charged = membrane + (x[:, i] - membrane) / 2
        spikes.append((charged >= 1).to(x))
        membrane = (1 - spikes[-1]) * charged
    return torch.stack(spikes, 1)


def mixed(t: dict[str, Tensor], name: str, x: Tensor, part: str) -> Tensor:
    """Token shift: x_t m + x_{t-1} (1 - m)."""
    m = t[f"{name}.time_mix_{part}"]
    return x * m + pad(x, (0, 0, 1, -1)) * (1 - m)


def time_mix(t: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """RWKV-4's attention by its definition: a sum over all tokens before, in fp64."""
    k, v = (linear(mixed(t, name, x, p), t[f"{name}.{w}.weight"]).double() for p, w in (("k", "key"), ("v", "value")))
    decay, first = -t[f"{name}.time_decay"].double().exp(), t[f"{name}.time_first"].double()
    outputs = []
    for i in range(x.shape[1]):
        age = torch.arange(i - 1, -1, -1)[:, None]
        weights = torch.cat([age * decay + k[:, :i], (first + k[:, i])[:, None]], 1).softmax(1)
        outputs.append((weights * v[:, : i + 1]).sum(1))
    r = sigmoid(linear(mixed(t, name, x, "r"), t[f"{name}.receptance.weight"]))
    return linear(r * torch.stack(outputs, 1).to(x), t[f"{name}.output.weight"])


def channel_mix(t: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    k = relu(linear(mixed(t, name, x, "k"), t[f"{name}.key.weight"])).square()
    r = sigmoid(linear(mixed(t, name, x, "r"), t[f"{name}.receptance.weight"]))
    return r * linear(k, t[f"{name}.value.weight"])


def spikegpt(t: dict[str, Tensor], layers: int, ids: Tensor) -> Tensor:
    """`ids [B, T]` -> logits `[B, T, vocabulary]`; embeddings are spikes, dropout is off."""

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"])

    x = norm((t["emb.weight"][ids] >= 0).to(t["emb.weight"]), "blocks.0.ln0")
    for layer in range(layers):
        name = f"blocks.{layer}"
        x = x + fire(time_mix(t, f"{name}.att", norm(x, f"{name}.ln1")))
        x = x + fire(channel_mix(t, f"{name}.ffn", norm(x, f"{name}.ln2")))
    return linear(norm(x, "ln_out"), t["head.weight"])
