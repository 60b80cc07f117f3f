"""What a run tells: a JSON line a step, TensorBoard, W&B if asked, and a progress bar."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .config import Watch
from .directory import EVENTS, METRICS


class Metrics:
    """Rows of rank 0. On resume the rows after the checkpoint's step are dropped, so that no step stands twice.

    `flops_per_token` of the model and `devices`: what MFU is computed from, where `watch.peak_tflops` is given.
    """

    def __init__(self, run: Path, first_step: int, steps: int, watch: Watch, flops_per_token: float, devices: int):
        self.path = run / METRICS
        rows = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [row for row in rows if row.endswith("}") and json.loads(row)["step"] <= first_step]
        self.path.write_text("".join(f"{row}\n" for row in kept))
        self._peak = watch.peak_tflops and watch.peak_tflops * 1e12 * devices / flops_per_token
        self._events = _tensorboard(run / EVENTS, first_step)
        self._wandb = _wandb(watch.wandb, run)
        self._bar = tqdm(total=steps, initial=first_step, desc=run.name, unit="step")
        self._clock = time.perf_counter()

    def write(self, step: int, *, tokens: float, **values: Any) -> None:
        """Add the row of a finished step."""
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        row = {"step": step, **values, "tokens": int(tokens), "seconds": round(seconds, 4)}
        row["tokens_per_second"] = round(tokens / seconds, 1)
        if self._peak:
            row["mfu"] = round(tokens / seconds / self._peak, 4)
        row["memory_bytes"] = _memory()
        self._append(row)
        figures = {name: value for name, value in row.items() if name != "step" and value is not None}
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(figures, step=step)
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s", refresh=False)
        self._bar.update()

    def skip(self, step: int, reason: str) -> None:
        """Add the row of a step that was left out."""
        self._append({"step": step, "skipped": reason})
        self._bar.update()

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def histograms(self, step: int, values: dict[str, torch.Tensor]) -> None:
        """Add distributions by name."""
        for name, tensor in values.items():
            self._events.add_histogram(name, tensor.float().flatten().cpu(), step)

    def close(self) -> None:
        """Finish the bar and the files."""
        self._bar.close()
        self._events.close()
        if self._wandb:
            self._wandb.finish()


def _tensorboard(folder: Path, first_step: int) -> Any:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step + 1)


def _wandb(project: str | None, run: Path) -> Any:
    if project is None:
        return None
    import wandb

    return wandb.init(project=project, name=run.name, id=run.name, resume="allow", dir=str(run))


def _memory() -> int:
    """The most that this process has held so far: of the GPU, or of the host without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
