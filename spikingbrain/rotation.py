"""The same function with its residual stream in a basis in which few channels carry most of a token.

A norm without gains commutes with rotations, so the stream may be turned by any orthogonal Q that the projections
around it absorb (SliceGPT, arXiv 2401.15024; QuaRot, 2404.00456). Along the principal axes of what the projections read
most channels are small for most tokens, and small channels can be silent at little cost (LaRoSA, arXiv 2507.01299,
which turns every layer apart).
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import token_rows
from .checkpoint import copy_tokenizer, load_model
from .config import SpikingBrainConfig
from .errors import InputError
from .experts import Router
from .files import new_directory
from .model import MixerBlock

BATCH = 8
LARGEST = 0.35  # the share of a token's channels whose share of its energy is reported
TOLERANCE = 1e-3  # of the largest logit; fp32 gives some 1e-6


def rotate(
    path: str | Path, out: str | Path, texts: list[Path], *, num_texts: int = 128, context: int = 256
) -> dict[str, tuple[float, float]]:
    """Write the model of `path` to `out`, its residual stream along the principal axes measured on texts (files).

    The embedding and the head are no longer one tensor, as the last norm's gain goes into the head. Returns for each
    norm the share of a token's energy in its largest channels, before and after. Raises `InputError` for a model that
    computes anything in the basis of its residual stream but norms and projections.
    """
    model = load_model(path)
    rows = token_rows(path, texts, num_texts, context)
    dtype = model.dtype
    shares = turn(model.float(), rows)
    with new_directory(out) as directory:
        model.to(dtype).save_pretrained(directory)
        copy_tokenizer(path, directory)
    return shares


def turn(model: Any, rows: Tensor) -> dict[str, tuple[float, float]]:
    """Rotate a model in place as `rotate` does; `rows [N, T + 1]` are token ids."""
    _refuse(model.config)
    sites = _sites(model)
    with torch.no_grad():
        expected = model(input_ids=rows[:1], use_cache=False).logits
        _fold_gains(model, sites)
        before = _observe(model, sites, rows)
        basis = _axes(sites, before).to(model.dtype)
        _turn(model, sites, basis)
        logits = model(input_ids=rows[:1], use_cache=False).logits
    if not (logits - expected).abs().max() <= TOLERANCE * expected.abs().max():
        raise InputError("rotated, this model computes something else: part of it depends on its channels' basis")
    after = _observe(model, sites, rows)
    return {name: (before[name].concentration(), after[name].concentration()) for name in sites}


def _refuse(config: Any) -> None:
    """Raise `InputError` for a config with something between norms and projections that Q cannot pass."""
    if not isinstance(config, SpikingBrainConfig):
        raise InputError(f"this is a {config.model_type} model; convert it first")
    bound = {
        "spikes": config.spiking is not None,
        "a norm before the first layer": config.embedding_norm,
        "an embedding of signs": config.spike_embedding,
        "LIF neurons after its blocks": config.lif is not None,
        f"norm {config.norm!r}": config.norm not in ("rms_norm", "simple_rms_norm"),
    }
    found = [what for what, has in bound.items() if has]
    if found:
        raise InputError(f"a model with {' and '.join(found)} cannot be rotated; rotate it before spikes are turned on")


@dataclass
class _Site:
    """A norm and the modules around it: what reads its output, and what adds to the residual stream after it."""

    norm: Any
    readers: list[nn.Linear] = field(default_factory=list)
    writers: list[nn.Linear] = field(default_factory=list)


def _sites(model: Any) -> dict[str, _Site]:
    sites = {}
    for number, layer in enumerate(model.model.layers):
        for name, whole in (("input_layernorm", layer.mixer), ("post_attention_layernorm", layer.mlp)):
            site = _Site(layer.get_submodule(name))
            for module in whole.modules():
                if isinstance(module, MixerBlock):
                    _sort(module, site)
                if isinstance(module, Router):
                    site.readers.append(module)
            sites[f"layers.{number}.{name}"] = site
    return sites


def _sort(block: MixerBlock, site: _Site) -> None:
    for name, projection in block.projections.items():
        if projection.source == "hidden":
            site.readers.append(block.get_submodule(name))  # type: ignore[arg-type]
        if projection.source == "mixed":
            site.writers.append(block.get_submodule(name))  # type: ignore[arg-type]


def _fold_gains(model: Any, sites: dict[str, _Site]) -> None:
    """Norms have gain 1 afterwards; the head is a tensor of its own."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    model.config.tie_word_embeddings = False
    for norm, readers in [(model.model.norm, [model.lm_head]), *((site.norm, site.readers) for site in sites.values())]:
        if norm.weight is not None:
            for reader in readers:
                reader.weight.mul_(norm.weight)
            norm.weight.fill_(1)


def _turn(model: Any, sites: dict[str, _Site], basis: Tensor) -> None:
    readers = [model.model.embed_tokens, model.lm_head]
    for site in sites.values():
        readers += site.readers
        for writer in site.writers:
            writer.weight.copy_(basis.T @ writer.weight)
            if writer.bias is not None:
                writer.bias.copy_(basis.T @ writer.bias)
    for reader in readers:
        reader.weight.copy_(reader.weight @ basis)


@dataclass
class _Moments:
    """Of what a norm gave: the sum of `x^T x [D, D]`, and each token's energy in its largest channels."""

    moments: Tensor | float = 0.0
    shares: list[Tensor] = field(default_factory=list)

    def see(self, _norm: nn.Module, _inputs: tuple[Tensor, ...], x: Tensor) -> None:
        values = x.flatten(0, -2).double()
        self.moments = self.moments + values.T @ values
        energy = values.square().sort(-1, descending=True).values
        self.shares.append(energy[:, : round(LARGEST * x.shape[-1])].sum(-1) / energy.sum(-1))

    def concentration(self) -> float:
        return float(torch.cat(self.shares).mean())


@torch.no_grad()
def _observe(model: Any, sites: dict[str, _Site], rows: Tensor) -> dict[str, _Moments]:
    seen = {name: _Moments() for name in sites}
    with contextlib.ExitStack() as hooks:
        for name, site in sites.items():
            hooks.enter_context(site.norm.register_forward_hook(seen[name].see))
        for part in rows.split(BATCH):
            model(input_ids=part[:, :-1].to(model.device), use_cache=False, logits_to_keep=1)
    return seen


def _axes(sites: dict[str, _Site], seen: dict[str, _Moments]) -> Tensor:
    """The principal axes `[D, D]`, a column each, the largest first; a norm counts by the outputs that read it."""
    total: Any = sum(
        seen[name].moments * sum(reader.out_features for reader in site.readers) for name, site in sites.items()
    )
    return torch.linalg.eigh(total).eigenvectors.flip(1)
