"""The commands `any4d-fast train` and `any4d-fast evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_commands(app: typer.Typer) -> None:
    """Register both."""
    app.command()(train)
    app.command()(evaluate)


def train(
    config: Annotated[
        str,
        typer.Option(
            help="A TOML file, or one of the package: tiny, the parts before it (docs/training.md), finetune, smoke."
        ),
    ],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Such as optimizer.lr=1e-4; repeatable.")
    ] = None,
    init: Annotated[str | None, typer.Option(help="Weights to start from: a file or a Hugging Face id.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run; one that was interrupted goes on.")] = None,
) -> None:
    """Train a model, or go on with an interrupted run."""
    import logging

    from .train.__main__ import run

    logging.getLogger("any4d_fast.train").setLevel(logging.INFO)
    raise typer.Exit(run(config, assignments or [], init=init, output=output))


def evaluate(
    checkpoint: Annotated[
        str | None, typer.Option(help="Weights: .pth, .safetensors or a Hugging Face id; the package's by default.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Architecture; tiny without a checkpoint.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The CSV to write.")] = Path("heldout.csv"),
    config: Annotated[str, typer.Option(help="Training configuration whose stream the clips are of.")] = "tiny",
    clips: Annotated[int, typer.Option(help="Held-out synthetic clips.", min=1)] = 200,
    batch_size: Annotated[int, typer.Option(help="Clips at once.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Which clips.", min=0)] = 0,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; a GPU where there is one.")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16 or fp32; bf16 on a GPU by default.")] = None,
) -> None:
    """Measure weights on held-out synthetic clips, with images alone and with rays, poses and depth."""
    from .backends import BackendError
    from .io.export import check_place
    from .train import evaluate as evaluation

    try:
        check_place(output)
        if precision not in (None, "bf16", "fp32"):
            raise ValueError(f"--precision: expected bf16 or fp32, got {precision!r}")
        rows = evaluation.evaluate_file(
            checkpoint, output, preset=preset, config=config, clips=clips, batch_size=batch_size, seed=seed,
            device=device, precision=precision,
        )  # fmt: skip
    except (ValueError, ImportError, OSError, BackendError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(evaluation.as_text(rows))
    typer.echo(f"wrote {output}")
