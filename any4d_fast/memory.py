"""How many bytes a call of the model needs, stage by stage, and how many views the dense heads take at once.

Sizes are counted from the configuration, in bytes on the device. At 518 x 336 (T = 37 x 24 = 888 patches a view), the
released architecture, bf16 autocast, one sample, 1,000 views:

| buffer | rows x channels x bytes | GB |
|---|---|---|
| images, as given and joined | 2 x 1,000 x 174,048 x 3 x 4 | 4.2 |
| encoder at its peak: stream, normed rows twice, MLP hidden, branch | 889,000 x 1,024 x (4 + 4 + 8 + 2) | 16.4 |
| fused tokens, kept for the heads | 888,001 x 1,024 x 4 | 3.6 |
| transformer at its peak: the same | 888,001 x 768 x 18 | 12.3 |
| two tapped maps and the last | 888,001 x 768 x 4 x 3 | 8.2 |
| a chunk of 16 views in the heads | 16 x 75 MB | 1.2 |
| outputs: 15 float32 and a mask a pixel | 1,000 x 174,048 x 61 | 10.6 |

The most that is alive at once is 26 GB without weights (2.3 GB, and 1.1 GB of their 16-bit copies) and without what
`infer` derives (7.8 GB of masked and further maps). So neither MLP nor QKV has to be cut into rows; only the heads,
whose maps at full resolution would take 75 GB, run in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .config import Any4DConfig, DenseHeadConfig
from .modules.encoder import REGISTERS

GIB = 1 << 30
CPU_HEAD_BYTES = GIB  # what the dense heads may take at once on a CPU
GPU_HEAD_SHARE = 0.5  # of the free memory, for the dense heads on a GPU
GPU_HEAD_IMAGES = 16  # enough to fill a GPU with the heads' smallest maps; more at once only take memory
UNNOTICED = 0.05  # share of a GPU's memory below which asking the driver what is free is not worth its time
LARGEST_MAP = 2**31 - 1  # elements of a map that every convolution library indexes

STREAM, HALF = 4, 2  # bytes of a float32 and of a 16-bit element


def head_bytes(head: DenseHeadConfig, grid: tuple[int, int], itemsize: int, unfused: bool = False) -> int:
    """Bytes alive at the peak of one dense head, for one image.

    Args:
        head: the head.
        grid: rows and columns of patches.
        itemsize: bytes of a map's element: 2 in float16, 4 in float32.
        unfused: the last stage runs in PyTorch's layers, with maps at full resolution.
    """
    patches = grid[0] * grid[1]
    first, second = head.hidden_dims or (head.feature_dim // 2, head.feature_dim // 2)
    # At four times the grid: a map, its ReLU, a hidden map, a convolution's result, and the two that follow it; the
    # coarser map that joins. At eight times: the features, and the next convolution before and after its bias.
    fusion = patches * head.feature_dim * (6 * 16 + 4)
    regression = patches * 64 * (head.feature_dim + 2 * first)
    most = max(fusion, regression)
    if unfused:
        most = max(most, patches * 64 * first + patches * 196 * (first + 2 * second))
    return itemsize * most + STREAM * patches * 196 * head.output_dim


def image_bytes(config: Any4DConfig, grid: tuple[int, int], itemsize: int, unfused: bool = False) -> int:
    """Bytes that the heads need for one image (of one sample) beside its outputs: maps, raw channels, token maps."""
    scene, transformer = config.scene, config.transformer
    patches = grid[0] * grid[1]
    first = config.encoder.dim if transformer.feeds_encoder_map else transformer.dim
    tokens = patches * (first + 3 * transformer.dim) * itemsize
    raw = STREAM * patches * 196 * (scene.geometry_head.output_dim + scene.flow_head.output_dim)
    return tokens + raw + max(head_bytes(h, grid, itemsize, unfused) for h in (scene.geometry_head, scene.flow_head))


def output_bytes(height: int, width: int) -> int:
    """Bytes of one image's outputs in the released representation: fifteen float32 and a mask a pixel."""
    return height * width * (STREAM * (3 + 3 + 3 + 1 + 3 + 1 + 1) + 1)


@dataclass(frozen=True)
class Footprint:
    """Bytes alive at the peak of each stage, weights left out."""

    encoder: int
    transformer: int
    heads: int

    @property
    def peak(self) -> int:
        return max(self.encoder, self.transformer, self.heads)


def footprint(config: Any4DConfig, batch: int, views: int, height: int, width: int, chunk: int) -> Footprint:
    """Bytes of a call without gradients under 16-bit autocast on a GPU, images only, weights left out.

    Args:
        config: the architecture.
        batch: samples.
        views: views of a sample.
        height, width: pixels.
        chunk: views that the heads take at once.
    """
    encoder, transformer = config.encoder, config.transformer
    grid = (height // encoder.patch_size, width // encoder.patch_size)
    patches, images = grid[0] * grid[1], batch * views
    pixels = images * height * width
    pictures = 2 * STREAM * 3 * pixels  # as given and joined
    rows = images * (patches + 1 + REGISTERS * encoder.with_registers)
    # A residual stream, the normed rows that a block was given and those that its MLP reads, the MLP's hidden rows (as
    # many as QKV and attention's result), a branch.
    per_channel = STREAM + 2 * HALF + 4 * HALF + HALF
    image_tokens = images * patches * encoder.dim * STREAM
    tokens = batch * (views * patches + 1) * encoder.dim * STREAM
    tap = batch * (views * patches + 1) * transformer.dim * STREAM
    stream = batch * (views * patches + 1) * transformer.dim * per_channel
    kept = (tokens if transformer.feeds_encoder_map else 0) + 3 * tap
    outputs = images * output_bytes(height, width)
    return Footprint(
        encoder=max(pictures + HALF * 3 * pixels + rows * encoder.dim * per_channel, pictures + image_tokens + tokens),
        transformer=pictures // 2 + tokens + 2 * tap + stream,
        heads=pictures // 2 + kept + outputs + batch * chunk * image_bytes(config, grid, HALF),
    )


def free_bytes(device: torch.device) -> int:
    """Bytes that PyTorch could still hand out on a CUDA device: free ones, and those that it holds unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def head_chunk(
    config: Any4DConfig,
    batch: int,
    views: int,
    grid: tuple[int, int],
    device: torch.device,
    *,
    itemsize: int = STREAM,
    memory_budget: float | None = None,
    keeps_outputs: bool = True,
) -> int:
    """Views that the dense heads take at once: as many as fit, in chunks of about equal length.

    Args:
        config: the architecture.
        batch: samples.
        views: views of a sample.
        grid: rows and columns of patches.
        device: where the heads run.
        itemsize: bytes of a map's element.
        memory_budget: GiB that the process may hold on a GPU in all, or the heads on a CPU; None: half of what is free
            on a GPU, 1 GiB on a CPU.
        keeps_outputs: whether all outputs stay on the device.
    """
    per_view = batch * image_bytes(config, grid, itemsize, unfused=device.type != "cuda")
    largest = batch * grid[0] * grid[1] * max(64 * config.scene.geometry_head.feature_dim, 196 * 16)
    limit = min(views, LARGEST_MAP // largest)
    if device.type == "cuda":
        limit = min(limit, max(1, GPU_HEAD_IMAGES // batch))
        patch = config.encoder.patch_size
        outputs = batch * views * output_bytes(grid[0] * patch, grid[1] * patch) if keeps_outputs else 0
        limit = min(limit, _fitting(per_view, max(limit, 1), outputs, device, memory_budget))
    else:
        budget = CPU_HEAD_BYTES if memory_budget is None else int(memory_budget * GIB)
        limit = min(limit, budget // per_view)
    return balanced(views, max(1, limit))


def _fitting(per_view: int, wanted: int, outputs: int, device: torch.device, memory_budget: float | None) -> int:
    """How many of the wanted views fit on a GPU beside the outputs."""
    if memory_budget is not None:
        return int((memory_budget * GIB - torch.cuda.memory_allocated(device) - outputs) // per_view)
    total = torch.cuda.get_device_properties(device).total_memory
    if wanted * per_view <= UNNOTICED * total or torch.cuda.is_current_stream_capturing():
        return wanted
    return int(min(GPU_HEAD_SHARE * free_bytes(device), free_bytes(device) - outputs) // per_view)


def balanced(views: int, limit: int) -> int:
    """Length of chunks, at most `limit`, that divide the views as evenly as can be."""
    chunks = -(-views // limit)
    return -(-views // chunks)
