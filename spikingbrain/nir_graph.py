"""Sub-graphs of leaky integrate-and-fire neurons and the projections that read them, as NIR graphs, and back.

NIR (Neuromorphic Intermediate Representation, Nature Communications 15, 2024) knows LIF neurons and linear maps, not
integer counts, attention or norms: of a model it can carry an encoder of `lif` or `plif` neurons with its projections.
tau dv/dt = -v + r x, read with Euler steps of `DT` seconds, is our v + (x - v) / tau_ours for tau = tau_ours DT. NIR
fires above the threshold, we at it too.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .neurons import lif
from .spiking import encoders, readers

# A token takes one step; what other packages read NIR with by default.
DT = 1e-4


class SubGraph(NamedTuple):
    """A neuron, and the weight `[out, in]` and bias `[out]` (or None) of each projection by name."""

    neuron: lif.Neuron
    projections: dict[str, tuple[Tensor, Tensor | None]]


def export_nir(model: Any, name: str) -> Any:
    """The `nir.NIRGraph` of the encoder `name` of `model`: input, neurons, a linear map and an output a projection.

    A spike is worth v_th to our projections and 1 in NIR, so the weights carry v_th. Raises `InputError` for an encoder
    that there is not, or whose neuron NIR cannot express.
    """
    import nir

    found = encoders(model)
    if name not in found:
        raise InputError(f"no encoder {name!r}; choose from {', '.join(found)}")
    neuron: Any = found[name].neuron
    if not isinstance(neuron, lif.Neuron) or neuron.reset != "hard":
        raise InputError(f"{name}: NIR knows leaky integrate-and-fire neurons with a hard reset only")
    nodes: dict[str, Any] = {"input": nir.Input({"input": _shape(neuron.channels)}), "neuron": _lif_node(neuron)}
    edges = [("input", "neuron")]
    for reader, linear in readers(model, name).items():
        nodes |= {reader: _linear_node(linear, neuron.v_th), f"{reader}_output": _output(linear.out_features)}
        edges += [("neuron", reader), (reader, f"{reader}_output")]
    return nir.NIRGraph(nodes, edges)


def import_nir(graph: Any) -> SubGraph:
    """The neuron and projections of a graph as `export_nir` makes them; raises `InputError` for any other."""
    import nir

    neurons = [node for node in graph.nodes.values() if isinstance(node, nir.LIF)]
    linears = {name: node for name, node in graph.nodes.items() if isinstance(node, (nir.Linear, nir.Affine))}
    others = set(map(type, graph.nodes.values())) - {nir.LIF, nir.Linear, nir.Affine, nir.Input, nir.Output}
    if len(neurons) != 1 or not linears or others:
        raise InputError("a graph of one LIF node and linear maps that read it is wanted")
    neuron = _neuron(neurons[0])
    projections = {}
    for name, node in linears.items():
        bias = torch.as_tensor(node.bias) if isinstance(node, nir.Affine) else None
        projections[name] = (torch.as_tensor(node.weight) / neuron.v_th, bias)
    return SubGraph(neuron, projections)


def _shape(size: int) -> Any:
    return np.array([size])


def _output(size: int) -> Any:
    import nir

    return nir.Output({"output": _shape(size)})


def _lif_node(neuron: lif.Neuron) -> Any:
    import nir

    tau = 1 / float(torch.as_tensor(neuron.leak()).detach())
    each = np.ones(neuron.channels)
    resistance = 1.0 if neuron.decay_input else tau
    return nir.LIF(tau * DT * each, resistance * each, 0 * each, neuron.v_th * each, 0 * each)


def _linear_node(linear: Any, v_th: float) -> Any:
    import nir

    weight = v_th * linear.weight.detach().numpy()
    return nir.Linear(weight) if linear.bias is None else nir.Affine(weight, linear.bias.detach().numpy())


def _neuron(node: Any) -> lif.Neuron:
    values = [node.tau, node.r, node.v_leak, node.v_threshold, node.v_reset]
    if any((value != value.flat[0]).any() for value in values) or node.v_leak.any() or node.v_reset.any():
        raise InputError("neurons that differ, or rest or reset elsewhere than at 0, are not ours")
    tau, resistance, threshold = (float(value.flat[0]) for value in (node.tau / DT, node.r, node.v_threshold))
    if abs(resistance - 1) > 1e-6 and abs(resistance / tau - 1) > 1e-6:
        raise InputError(f"a resistance of {resistance} is neither 1 nor the time constant in steps, {tau}")
    return lif.Neuron(len(node.tau), tau=tau, v_th=threshold, decay_input=abs(resistance - 1) <= 1e-6)
