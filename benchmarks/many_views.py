"""One call at a thousand views, as a user makes it: `python -m benchmarks.many_views [views]`.

Images come from host memory and finished outputs go back there (`infer(..., outputs_to="cpu")`); the time is the host's
clock from the call until everything is back, after a call of few views that compiled the kernels. Memory is
the most that the GPU held.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

from any4d_fast import Any4D

from .results import Row, record, results_path, short

HEIGHT, WIDTH = 336, 518


def main(arguments: Sequence[str] | None = None) -> int:
    counts = [int(text) for text in (sys.argv[1:] if arguments is None else arguments)] or [1000]
    if not torch.cuda.is_available():
        print("needs a CUDA device, and PyTorch sees none", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Any4D.from_preset("any4d").to("cuda").eval()
    for count in (3, *counts):
        views = [{"img": torch.randint(0, 256, (HEIGHT, WIDTH, 3), dtype=torch.uint8)} for _ in range(count)]
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        outputs = model.infer(views, outputs_to="cpu", apply_mask=False)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if not all(bool(output["pts3d"].isfinite().all()) for output in (outputs[0], outputs[-1])):
            raise AssertionError(f"{count} views: the points are not finite")
        del outputs
        if count == 3:
            continue
        row = Row("model", "any4d", "fwd", "any4d_fast", "auto", views=count, size=f"{WIDTH}x{HEIGHT} host to host")
        row.ms, row.peak_gb = short(1e3 * seconds), short(torch.cuda.max_memory_reserved() / 1e9)
        record([row])
        print(f"{count} views: {seconds:.2f} s, {row.peak_gb} GB; recorded in {results_path()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
