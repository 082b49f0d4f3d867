"""The command `any4d-fast`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cli_train import add_commands

if TYPE_CHECKING:
    from .demo import Errors
    from .model import Any4D
    from .pipeline import Run

app = typer.Typer(
    name="any4d-fast",
    help="Metric 4D reconstruction from video: depth, cameras, points and scene flow, in metres.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)

SYNTHETIC = "[yellow]The packaged weights of tiny know synthetic rooms alone. Give --checkpoint for real videos."
UNTRAINED = "[yellow]The weights are random (seeded): the geometry means nothing. Give --checkpoint for real results."

Checkpoint = Annotated[
    str | None, typer.Option("--checkpoint", help="Weights: .pth, .safetensors or a Hugging Face id.")
]
Preset = Annotated[str | None, typer.Option(help="Architecture: any4d, any4d-base or tiny (trained).")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu; by default a GPU where there is one.")]


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit status 2; anything else keeps its traceback."""
    try:
        yield
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        from .backends import BackendError

        # Of runtime errors, that the backend or precision asked for cannot run here.
        if isinstance(error, RuntimeError) and not isinstance(error, BackendError):
            raise
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        console.print("interrupted; nothing was half-written")
        raise typer.Exit(130) from None


@contextmanager
def _progress(model: Any4D) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """A progress bar over the model's modules and blocks; yields what to call after a step and after reading."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from .stages import steps

    columns = (SpinnerColumn(), TextColumn("{task.description:<22}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading", total=steps(model) + 1)

        def on_step(stage: str) -> None:
            bar.update(task, advance=1, description=stage)

        def on_read(frames: int) -> None:
            bar.update(task, advance=1, description=f"{frames} frames")

        yield on_step, on_read


def _parse_size(text: str | None) -> int | tuple[int, int] | None:
    """`518` is the long side; `336x518` is height x width."""
    if text is None:
        return None
    parts = text.lower().split("x")
    try:
        numbers = [int(p) for p in parts]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    raise ValueError(f"--size: expected a number (long side) or HEIGHTxWIDTH, got {text!r}")


def _report(run: Run, paths: list[Path], details: dict[str, str]) -> None:
    """The closing table."""
    reconstruction = run.reconstruction
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("frames", str(reconstruction.num_views))
    table.add_row("size", f"{reconstruction.width} x {reconstruction.height}")
    for stage, seconds in run.times.seconds.items():
        table.add_row(stage, f"{seconds:.2f} s")
    table.add_row("total", f"{sum(run.times.seconds.values()):.2f} s")
    table.add_row("peak memory", f"{run.peak_bytes / 2**30:.2f} GiB")
    table.add_row("metric scale", f"{reconstruction.metric_scale:.4f}")
    for name, value in details.items():
        table.add_row(name, value)
    for path in paths:
        table.add_row("wrote", escape(str(path)))
    Console().print(table)
    if not run.trained:
        console.print(UNTRAINED)


@app.command()
def reconstruct(
    inputs: Annotated[list[Path], typer.Argument(help="A video, a folder of images, or image files in order.")],
    output: Annotated[
        list[Path], typer.Option("--output", "-o", help="Where to write: .npz, .ply, .glb, .rrd or .png; repeatable.")
    ],
    checkpoint: Checkpoint = None,
    preset: Preset = None,
    frames: Annotated[int | None, typer.Option(help="At most so many frames.", min=1)] = None,
    stride: Annotated[int, typer.Option(help="Every how-many-th frame.", min=1)] = 1,
    reference: Annotated[int, typer.Option(help="Frame whose camera is the world and whose pixels carry flow.")] = 0,
    size: Annotated[str | None, typer.Option(help="Model size: the long side, or HEIGHTxWIDTH.")] = None,
    device: Device = None,
    intrinsics: Annotated[
        str | None, typer.Option(help="fx,fy,cx,cy in pixels of the given images, or a file.")
    ] = None,
    depth: Annotated[
        Path | None, typer.Option(help="Folder or file of z-depth: metres, or 16-bit millimetres.")
    ] = None,
    poses: Annotated[
        Path | None, typer.Option(help="File of camera-to-world poses: .npy, .txt (TUM, KITTI), .json.")
    ] = None,
) -> None:
    """Reconstruct a clip."""
    with _plain_errors():
        from .io.export import check_output, save
        from .pipeline import load_model, run

        for path in output:
            check_output(path)
        chosen = _parse_size(size)
        model, trained = load_model(checkpoint, preset, device)
        with _progress(model) as (on_step, on_read):
            result = run(
                model, inputs[0] if len(inputs) == 1 else inputs, frames=frames, stride=stride, reference=reference,
                size=chosen, intrinsics=intrinsics, depth=depth, poses=poses, trained=trained, on_step=on_step,
                on_read=on_read,
            )  # fmt: skip
        for path in output:
            save(result.reconstruction, path)
        _report(result, output, {})
        if trained and checkpoint is None:
            console.print(SYNTHETIC)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")] = Path("demo_out"),
    checkpoint: Checkpoint = None,
    preset: Preset = None,
    frames: Annotated[int, typer.Option(help="Frames of the synthetic clip.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the synthetic scene.")] = 0,
    device: Device = None,
) -> None:
    """Reconstruct a synthetic clip, write every output format, and print the error against ground truth.

    Without --checkpoint and --preset: with the trained weights of tiny that come with the package.
    """
    with _plain_errors():
        from .demo import run_demo
        from .pipeline import load_model

        model, trained = load_model(checkpoint, preset or (None if checkpoint else "tiny"), device)
        with _progress(model) as (on_step, _):
            result, errors, paths = run_demo(model, output, frames=frames, seed=seed, trained=trained, on_step=on_step)
        _report(result, paths, _error_rows(errors))


def _error_rows(errors: Errors) -> dict[str, str]:
    rows: dict[str, Any] = {
        "depth AbsRel": (errors.depth_abs_rel, "{:.3f} (median-scaled)"),
        "depth scale": (errors.scale_ratio, "{:.3f} of the true one"),
        "flow EPE, moving": (
            errors.flow_epe,
            f"{{:.3f}} m (predicting no motion: {errors.flow_epe_of_no_motion:.3f} m)",
        ),
        "rotation error": (errors.rotation_degrees, "{:.2f} degrees (median)"),
        "focal length error": (errors.focal_percent, "{:.1f} %"),
    }
    return {name: text.format(value) for name, (value, text) in rows.items() if value is not None}


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint: .pth as upstream saves it, or .safetensors.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    preset: Preset = None,
) -> None:
    """Check a checkpoint and write it as .safetensors, each tensor once.

    Without --preset: of the architecture that the file names, or the released one.
    """
    with _plain_errors():
        from .checkpoint import convert as convert_checkpoint
        from .config import preset as preset_config

        count = convert_checkpoint(source, target, preset_config(preset) if preset else None)
        typer.echo(f"wrote {target}: {count} tensors, {target.stat().st_size / 2**20:.1f} MiB")


@app.command()
def profile(
    views: Annotated[int, typer.Option(help="Views of a sample.", min=1)] = 8,
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH in pixels, multiples of 14.")] = "336x518",
    batch: Annotated[int, typer.Option(help="Samples.", min=1)] = 1,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    precision: Annotated[str, typer.Option(help="exact, or fp8 on Hopper or newer.")] = "exact",
    modalities: Annotated[
        str, typer.Option(help="Inputs beside images, comma-separated: rays, depth, poses, flow; or all.")
    ] = "",
    checkpoint: Checkpoint = None,
    preset: Preset = None,
    device: Device = None,
    runs: Annotated[int, typer.Option(help="Measured runs.", min=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time, FLOPs, bytes and distance from the floor of every stage of a forward pass."""
    with _plain_errors():
        import json

        from .pipeline import load_model
        from .profile import profile as measure
        from .profile import render
        from .work import MODALITIES

        chosen = _parse_size(size)
        if not isinstance(chosen, tuple):
            raise ValueError(f"--size: expected HEIGHTxWIDTH, got {size!r}")
        names = MODALITIES if modalities == "all" else tuple(name for name in modalities.split(",") if name)
        model, _ = load_model(checkpoint, preset or (None if checkpoint else "any4d"), device)
        if next(model.parameters()).device.type == "cpu":
            typer.echo("on a CPU this takes minutes; --preset tiny, --runs 1 or a GPU is faster", err=True)
        settings = {"dtype": dtype, "precision": precision}
        found = measure(model, views, chosen, batch=batch, modalities=names, runs=runs, **settings)
        typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else render(found))


@app.command()
def info() -> None:
    """Versions, GPUs, and which backends can run here."""
    from .info import main as print_info

    raise typer.Exit(print_info([]))


add_commands(app)


def main() -> None:
    """Entry point of the command."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    app(prog_name="any4d-fast")


if __name__ == "__main__":
    main()
