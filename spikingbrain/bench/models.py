"""Models of one shape with random weights: ours, packed in several ways, and Hugging Face's Qwen2."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from spikingbrain_kernels.recording import Recording

from ..config import SpikingBrainConfig
from ..decoding import Decoder
from ..errors import InputError
from ..files import read_json
from ..model import SpikingBrainForCausalLM
from ..neurons import Spikes, SpikingNeuron
from ..packing import PackedLinear
from ..spiking import encoders
from ..state import StatePool

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_MASKS = 8
ADAPTIVE = {"neuron": "adaptive", "params": {"k": 3.0}}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
)


class Replay:
    """Counts that encoders fire, token after token, over and over; `now` are one token's, a view for each encoder."""

    def __init__(self, counts: dict[str, Tensor], dtype: torch.dtype):
        self._rows = torch.cat(list(counts.values()), 1).to(dtype)
        self._token = self._rows[0].clone()
        self._calls = 0
        self.now = dict(zip(counts, self._token.split([part.shape[1] for part in counts.values()]), strict=True))

    def advance(self) -> None:
        """Go to the next token's counts."""
        self._token.copy_(self._rows[self._calls % len(self._rows)])
        self._calls += 1


class Replayed(SpikingNeuron):
    """A neuron whose counts are given. The neuron itself still runs, for its time and its scale."""

    def __init__(self, neuron: SpikingNeuron, replay: Replay, name: str):
        super().__init__(neuron.channels)
        self.neuron, self.replay, self.counts = neuron, replay, replay.now[name]

    def fire(self, x: Tensor) -> Spikes:
        """`x [..., C]` -> `Spikes`."""
        return Spikes(self.counts.expand_as(x), self.neuron.fire(x).scale)


def replay(model: Any, counts: dict[str, Tensor]) -> Any:
    """Let every spike encoder of `model` fire its `counts [N, C]`, token after token."""
    source = Replay({name: counts[name] for name in encoders(model)}, model.dtype)
    for name, encoder in encoders(model).items():
        neuron: Any = encoder.neuron.neuron if isinstance(encoder.neuron, Replayed) else encoder.neuron
        encoder.neuron = Replayed(neuron, source, name)
    return model


def silence(model: Any, silent: float) -> Any:
    """Let every spike encoder of `model` keep this part of its channels silent, another one each time."""
    return replay(model, {name: _some(encoder.neuron.channels, silent) for name, encoder in encoders(model).items()})


def _some(channels: int, silent: float) -> Tensor:
    """Counts of 1 to 8 `[NUM_MASKS, channels]`, but 0 in exactly this part of each row."""
    counts = torch.randint(1, 9, (NUM_MASKS, channels))
    order = torch.rand(NUM_MASKS, channels).argsort(-1)
    return counts.scatter(-1, order[:, : round(silent * channels)], 0)


def ours(
    path: str | Path, dtype: str, layers: int | None, *, spiking: dict[str, Any] | None = None
) -> SpikingBrainForCausalLM:
    """Our model of a config file's shape, with random weights; `spiking` as in the config."""
    keys = read_json(path)
    if keys.get("model_type") != "spikingbrain":
        raise InputError(f"{path} is not a config of ours")
    keys = {key: value for key, value in keys.items() if key not in ("architectures", "model_type")}
    keys["num_hidden_layers"] = layers or keys["num_hidden_layers"]
    keys["spiking"] = spiking
    return _random(SpikingBrainForCausalLM, SpikingBrainConfig(**keys), dtype)


def packed_bytes(model: Any) -> int:
    """Bytes of all packed weights: what a dense decode step reads."""
    return sum(module.packed.nbytes for module in model.modules() if isinstance(module, PackedLinear))


def qwen2(config: Any, dtype: str) -> Qwen2ForCausalLM:
    """Hugging Face's softmax model of the same sizes."""
    sizes = {name: getattr(config, name) for name in SIZES}
    return _random(Qwen2ForCausalLM, Qwen2Config(**sizes, rope_parameters=config.rope_parameters), dtype)


def _random(model_class: Any, config: Any, dtype: str) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        torch.manual_seed(0)
        return model_class(config).eval()
    finally:
        torch.set_default_dtype(before)


class OurDecoder:
    """One sequence at a position, decoding through the step function over a pool, as the engine does."""

    def __init__(self, model: Any, position: int):
        self.model, self.position = model, position
        pool = StatePool(model.state_specs(), 1, "cpu")
        self.slot, self.decoder = pool.allocate(), Decoder(model, pool)
        self._replay = next((module.replay for module in model.modules() if isinstance(module, Replayed)), None)
        for layer in pool.states(torch.tensor([self.slot])):
            states: list[Any] = list(layer.values())
            for state in states:
                state.pool.normal_(std=0.1)  # as if `position` tokens had been read

    def advance(self) -> None:
        """Let encoders whose counts are given fire the next token's; not to be timed, as no model has to do it."""
        if self._replay:
            self._replay.advance()

    def step(self, token: int = 5) -> Tensor:
        """The logits after one more token."""
        return self.model.lm_head(self.decoder([token], [self.position], [self.slot]))

    def seconds_outside(self, token: int = 5) -> float | None:
        """What a token takes besides native kernels, its head left out; the least of ten. None if not recorded."""
        inputs = (torch.tensor([value]) for value in (token, self.position, self.slot))
        recording = Recording(self.decoder.plain, *inputs)
        return None if recording.why_not else min(recording.seconds_outside() for _ in range(10))


def first_logits(model: Any) -> Tensor:
    """What a decoder of `model` gives for the same token after the same state, whatever its weights are packed as."""
    torch.manual_seed(0)
    return OurDecoder(model, 1).step()


def read(model: Any, tokens: Tensor, chunk: int) -> Tensor:
    """The logits after a prompt of `tokens [1, T]`, read in chunks over a pool as the engine does."""
    device, length = model.device, tokens.shape[1]
    pool = StatePool(model.state_specs(), 1, device)
    states = pool.states(torch.tensor([pool.allocate()], device=device))
    for start, part in zip(range(0, length, chunk), tokens.split(chunk, 1), strict=True):
        positions = torch.arange(start, start + part.shape[1], device=device)[None]
        hidden, _ = model.step(part, states, positions=positions)
    return model.lm_head(hidden[:, -1])


class TheirDecoder:
    """The same for a model of Hugging Face, with a cache of keys and values of `position` tokens."""

    def __init__(self, model: Any, position: int):
        self.model, config = model, model.config
        self._cache = DynamicCache(config=config)
        shape = (1, config.num_key_value_heads, position, config.hidden_size // config.num_attention_heads)
        for layer in range(config.num_hidden_layers):
            keys, values = ((torch.randn(shape) * 0.1).to(model.dtype) for _ in range(2))
            self._cache.update(keys, values, layer)

    def step(self, token: int = 5) -> Tensor:
        """The logits after one more token."""
        return self.model(torch.tensor([[token]]), past_key_values=self._cache, use_cache=True).logits[:, -1]
