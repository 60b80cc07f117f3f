"""The report: one HTML page with its plots inside, and the figures as JSON."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from ..files import write_json

STAGES = ("unigram", "base", "converted", "distilled", "trained", "spiking")
TEMPLATE = Path(__file__).parent / "report.html.jinja"
INK, ACCENT, SECOND = "#1f2933", "#0b7285", "#c2410c"


def write_report(out: Path, figures: dict[str, Any], curves: dict[str, list[dict[str, Any]]]) -> None:
    """Write `report.json` and `report.html` to `out`; `curves`: the metrics of each training run."""
    from jinja2 import Environment

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", figures)
    plots = {
        "losses": _losses(figures["losses"]),
        "curves": _curves(curves),
        "firing": _firing(figures["spikes"]),
        "raster": _raster(figures["raster"]),
        "lengths": _lengths(figures["lengths"], figures["server"]["state_bytes"]),
    }
    for name, png in plots.items():
        (out / f"{name}.png").write_bytes(png)
    images = {name: base64.b64encode(png).decode() for name, png in plots.items()}
    page = Environment(autoescape=True).from_string(TEMPLATE.read_text())
    text = page.render(figures=figures, images=images, as_json=json.dumps(figures, indent=2))
    (out / "report.html").write_text(text)


def _figure(columns: int = 1, height: float = 3.4) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in [axes] if columns == 1 else axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _losses(losses: dict[str, float]) -> bytes:
    figure, axis = _figure()
    names = [name for name in STAGES if name in losses]
    values = [losses[name] for name in names]
    bars = axis.bar(names, values, color=[ACCENT if name == "spiking" else "#94a3b8" for name in names])
    axis.bar_label(bars, fmt="%.2f")
    axis.set_ylabel("held-out loss (nats a token)")
    return _png(figure)


def _curves(curves: dict[str, list[dict[str, Any]]]) -> bytes:
    figure, axes = _figure(len(curves), height=2.8)
    for axis, (name, rows) in zip(axes, curves.items(), strict=True):
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=ACCENT, linewidth=1)
        axis.set(title=name, xlabel="step")
    axes[0].set_ylabel("training loss of the stage")
    return _png(figure)


def _firing(spikes: dict[str, Any]) -> bytes:
    figure, axis = _figure(height=3.8)
    names = list(spikes["encoders"])
    labels = [name.removeprefix("model.layers.").replace(".encoders.", " ").replace(".", " ") for name in names]
    axis.bar(labels, [spikes["encoders"][name]["silent_channels"] for name in names], color=ACCENT)
    gaussian = spikes["gaussian"]["silent_channels"]
    axis.axhline(gaussian, color=SECOND, linestyle="--", label=f"Gaussian noise, no training ({gaussian:.3f})")
    axis.set_ylabel("silent channels (share)")
    axis.tick_params(axis="x", rotation=90, labelsize=7)
    axis.legend(frameon=False)
    return _png(figure)


def _raster(raster: dict[str, Any]) -> bytes:
    figure, axis = _figure(height=4)
    points = [(t, c, n) for t, row in enumerate(raster["counts"]) for c, n in enumerate(row) if n]
    t, c, n = zip(*points, strict=True)
    colours = [ACCENT if count > 0 else SECOND for count in n]
    axis.scatter(t, c, s=[min(abs(count), 8) for count in n], c=colours, linewidths=0)
    axis.set(xlabel="token", ylabel="channel", title=f"{raster['encoder']}: dot size is |count|, orange is negative")
    return _png(figure)


def _lengths(lengths: dict[str, list[dict[str, float]]], served: dict[str, int]) -> bytes:
    figure, (speed, memory) = _figure(2)
    for (name, rows), colour in zip(lengths.items(), (SECOND, ACCENT), strict=True):
        x = [row["length"] for row in rows]
        speed.plot(x, [1 / row["seconds_per_token"] for row in rows], "o-", color=colour, label=name)
        memory.plot(x, [row["bytes"] for row in rows], "o-", color=colour, label=name)
    memory.plot(list(map(int, served)), list(served.values()), "x", color=INK, label="spiking, as served")
    speed.set(xscale="log", xlabel="tokens before", ylabel="decoded tokens a second", ylim=(0, None))
    memory.set(xscale="log", yscale="log", xlabel="tokens before", ylabel="bytes remembered a sequence")
    memory.legend(frameon=False, fontsize=8)
    return _png(figure)
