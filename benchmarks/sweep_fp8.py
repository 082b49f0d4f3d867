"""Which layers `precision="fp8"` may take: `python -m benchmarks.sweep_fp8 [views ...]`.

For the released architecture with random weights (two seeds) and with weights by rule, every choice of 8-bit layers:
the error of each output as a part of what is allowed (five times that of bfloat16), and the time beside that of the
exact call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from any4d_fast import Any4D
from any4d_fast.modules import packing_fp8
from any4d_fast.modules.packing_fp8 import Layers
from benchmarks.bench_model import (
    FP8_FACTOR,
    UPSTREAM_ERRORS,
    by_output,
    float32,
    make_views,
    mixed,
    output_budgets,
)
from benchmarks.harness import FULL, relative_error
from benchmarks.timing import time_ms
from tests.golden_cases import golden_weights

QKV, MLP = Layers(mlp=False), Layers(qkv=False)
ALL, NONE = Layers(), Layers(False, False, False)
CHOICES = {  # encoder, transformer
    "default": (packing_fp8.ENCODER, packing_fp8.TRANSFORMER),
    "- | mlp": (NONE, MLP),
    "- | qkv mlp": (NONE, ALL),
    "qkv | qkv": (QKV, QKV),
    "mlp | mlp": (MLP, MLP),
    "all": (ALL, ALL),
    "all, 16-bit attention": (Layers(attention=False), Layers(attention=False)),
}


def models() -> Iterator[tuple[str, Any4D]]:
    for seed in (0, 1):
        torch.manual_seed(seed)
        with torch.device("cuda"):
            yield f"random {seed}", Any4D.from_preset("any4d").to("cuda").eval()
    model = Any4D.from_preset("any4d")
    golden_weights(model)
    yield "by rule", model.to("cuda").eval()


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [relative_error(a, b) for a, b in zip(found, exact, strict=True)]


@torch.no_grad()
def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    counts = [int(text) for text in sys.argv[1:]] or [2, 8]
    for name, model in models():
        for count in counts:
            views = make_views(FULL, count)
            with float32():
                exact = by_output(model(views))
            with mixed(FULL, "eager"):
                base = by_output(model(views))
            allowed = [FP8_FACTOR * b for b in output_budgets(errors(base, exact), base)]
            with mixed(FULL, None):
                ms = time_ms(lambda m=model, v=views: m(v), False)[0]
            print(f"{name}, {count} views: exact {ms:.2f} ms", flush=True)
            for label, (packing_fp8.ENCODER, packing_fp8.TRANSFORMER) in CHOICES.items():
                model._graphs.clear()
                with mixed(FULL, None):
                    found = by_output(model(views, precision="fp8"))
                    ms = time_ms(lambda m=model, v=views: m(v, precision="fp8"), False)[0]
                parts = [e / a for e, a in zip(errors(found, exact), allowed, strict=True)]
                listed = " ".join(f"{key} {part:.2f}" for key, part in zip(UPSTREAM_ERRORS, parts, strict=True))
                print(f"  {label:30s} {ms:8.2f} ms, worst {max(parts):.2f} of 1: {listed}", flush=True)
        del model


if __name__ == "__main__":
    main()
