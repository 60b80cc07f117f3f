"""What a run tells: a JSON line a step in `metrics.jsonl`, and a progress bar."""

import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Metrics:
    """Rows of rank 0. On resume the rows after the checkpoint's step are dropped, so that no step stands twice."""

    def __init__(self, run: Path, first_step: int, steps: int):
        self.path = run / "metrics.jsonl"
        rows = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [row for row in rows if row.endswith("}") and json.loads(row)["step"] <= first_step]
        self.path.write_text("".join(f"{row}\n" for row in kept))
        self._bar = tqdm(total=steps, initial=first_step, desc=run.name, unit="step")
        self._clock = time.perf_counter()

    def write(self, step: int, *, tokens: float, **values: Any) -> None:
        """Add the row of a finished step."""
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        row = {"step": step, **values, "tokens": int(tokens), "seconds": round(seconds, 4)}
        row["tokens_per_second"] = round(tokens / seconds, 1)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Finish the bar."""
        self._bar.close()
