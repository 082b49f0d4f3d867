"""`python -m any4d_fast.train CONFIG [--set key=value ...]`: the trainer without the command line's packages."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

STOPPED = 75
"""Exit status of a run that was stopped and goes on at the next call (EX_TEMPFAIL)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a configuration; returns the exit status: 0 finished, 75 stopped with a checkpoint, 2 a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m any4d_fast.train", description="Train a model.")
    parser.add_argument("config", help="a TOML file, or tiny, a part before it (docs/training.md), finetune or smoke")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as optimizer.lr=1e-4")
    parser.add_argument("--init", help="weights to start from: a file or a Hugging Face id (model.init)")
    parser.add_argument("--output", help="folder of the run (run.output)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("any4d_fast.train").setLevel(logging.INFO)
    return run(options.config, options.set, init=options.init, output=options.output, progress=not options.quiet)


def run(
    config: str,
    assignments: Sequence[str],
    *,
    init: str | None = None,
    output: str | None = None,
    progress: bool = True,
) -> int:
    """Train; a user's mistake is one line and status 2."""
    from ..backends import BackendError
    from .config import TrainConfig
    from .trainer import TrainingError, train

    try:
        settings = TrainConfig.load(config, assignments, init=init, output=output)
        result = train(settings, progress=progress)
    except (ValueError, ImportError, OSError, TrainingError, BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if result.finished else STOPPED


if __name__ == "__main__":
    sys.exit(main())
