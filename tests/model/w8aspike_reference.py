"""W8ASpike as its authors' code computes it, token by token in plain torch: what the int8 model is compared with."""

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid, relu, rms_norm, silu


def round_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """round(W / s) s in groups of 128 inputs, nothing clamped."""
    groups = weight.view(weight.shape[0], -1, 128)
    return ((groups / scale).round() * scale).view_as(weight)


def spike(x: Tensor) -> Tensor:
    """Counts times threshold, one threshold for the last dimension."""
    threshold = (x.abs().mean(-1, keepdim=True) / 3).clamp(1e-5, 1e4)
    return (x / threshold).round() * threshold


def int8(x: Tensor) -> Tensor:
    """Symmetric, one scale for the last dimension."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-128, 127) * scale


def projected(t: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = round_weight(t[f"{name}.weight"], t[f"{name}.weight_quantizer.scales"])
    return linear(spike(x), weight, t.get(f"{name}.bias"))


def rotated(x: Tensor, theta: float) -> Tensor:
    """`x [B, T, H, D]` at positions 0, 1, ..."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] / theta ** (torch.arange(half) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)


def linear_attention(t: dict[str, Tensor], name: str, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    decay = (logsigmoid(projected(t, f"{name}.gk_proj", x)) / 16).exp().unflatten(-1, k.shape[2:])
    groups, outputs, state = q.shape[2] // k.shape[2], [], 0.0
    for i in range(x.shape[1]):
        state = decay[:, i, :, :, None] * state + relu(k[:, i])[..., None] * v[:, i, :, None]
        read = state.repeat_interleave(groups, 1)
        outputs.append(torch.einsum("bhk,bhkv->bhv", relu(q[:, i]) * q.shape[-1] ** -0.5, read))
    return rms_norm(torch.stack(outputs, 1), q.shape[-1:], t[f"{name}.g_norm.weight"], 1e-6)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, theta: float) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    q, k, v = spike(rotated(q, theta)), int8(rotated(k, theta)), int8(v)
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    hidden = (distance < 0) | (distance >= window)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def logits(t: dict[str, Tensor], config: dict, ids: Tensor) -> Tensor:
    """`t`: the released tensors, `config`: the released config.json, `ids [B, T]` -> `[B, T, vocabulary]`."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    x = t["model.embeddings.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        y = rms_norm(x, (width,), t[f"{name}.attn_norm.weight"], 1e-6)
        q, k, v = (projected(t, f"{name}.attn.{p}_proj", y).unflatten(-1, (-1, width // heads)) for p in "qkv")
        if layer % 2:
            y = window_attention(q, k, v, config["sliding_window"], config["rope_theta"])
        else:
            y = linear_attention(t, f"{name}.attn", q, k, v, y)
        x = x + projected(t, f"{name}.attn.o_proj", y.flatten(2))
        y = rms_norm(x, (width,), t[f"{name}.mlp_norm.weight"], 1e-6)
        gate, up = (projected(t, f"{name}.mlp.{p}_proj", y) for p in ("gate", "up"))
        # The released code hands the fp32 weight to a fused product: neither spikes nor the quantiser see it.
        x = x + linear(silu(gate) * up, t[f"{name}.mlp.down_proj.weight"])
    return linear(rms_norm(x, (width,), t["model.norm.weight"], 1e-6), t["lm_head.weight"])
