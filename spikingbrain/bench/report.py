"""What a suite found, as JSON, as a table and as a plot."""

import json
from importlib.util import find_spec
from pathlib import Path

from . import Row

MEASURES = ("tokens/s", "GB/s", "MB", "us")


def table(rows: list[Row]) -> str:
    """A Markdown table with a column for everything that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_text(row.get(key)) for key in columns] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def write(folder: Path, suite: str, command: str, rows: list[Row]) -> None:
    """`SUITE.json`, `SUITE.md` and, where matplotlib is installed, `SUITE.png` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{suite}.json").write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    (folder / f"{suite}.md").write_text(f"`{command}`\n\n{table(rows)}")
    if find_spec("matplotlib") is not None:
        _plot(folder / f"{suite}.png", suite, rows)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def _plot(path: Path, title: str, rows: list[Row]) -> None:
    from matplotlib.figure import Figure

    measure = next((name for name in MEASURES if any(name in row for row in rows)), None)
    bars = [(_label(row), row[measure]) for row in rows if measure in row]
    figure = Figure(figsize=(8, 1 + 0.22 * len(bars)), layout="tight")
    axes = figure.subplots()
    axes.barh([label for label, _ in reversed(bars)], [value for _, value in reversed(bars)])
    axes.set_title(title)
    axes.set_xlabel(measure or "")
    axes.tick_params(labelsize=7)
    figure.savefig(path, dpi=110)


def _label(row: Row) -> str:
    words = [f"{key} {value}" if isinstance(value, int) else str(value) for key, value in row.items()]
    return ", ".join(word for word, value in zip(words, row.values(), strict=True) if not isinstance(value, float)) + (
        f", {row['silent']:.0%} silent" if "silent" in row else ""
    )
