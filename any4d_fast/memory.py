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
| a chunk of 12 views in the heads | 12 x 14 MB + 4 x 62 MB | 0.4 |
| outputs: 15 float32 and a mask a pixel | 1,000 x 174,048 x 61 | 10.6 |

The most that is alive at once is 25 GB without weights (2.45 GB, and 1.03 GB of their 16-bit copies) and without what
`infer` derives (7.8 GB of masked and further maps). So neither MLP nor QKV has to be cut into rows; only the heads,
whose maps at full resolution would take 75 GB, run in chunks.

A chunk has two lengths. The coarser levels take up to `GPU_HEAD_IMAGES` views, because their maps are small and a few
views of them leave most of a GPU idle; the finest level and what follows it take `GPU_FINE_IMAGES` of these at once.

## What the peak of a call is made of

Released architecture, 518 x 336, images only, bf16 autocast; GB (1e9 bytes), counted:

| | 2 views | 8 views | 41 views |
|---|---|---|---|
| float32 parameters, 613.7 M: encoder 1.22, transformer 0.68, tokenizers 0.38, heads 0.18 | 2.45 | 2.45 | 2.45 |
| 16-bit copies: encoder 0.60, transformer 0.34, heads 0.08 (tokenizers 0.18 with dense inputs) | 1.03 | 1.03 | 1.03 |
| images, as given (and a graph's copy) and joined | 0.01 | 0.05 | 0.17 |
| encoder at its peak | 0.03 | 0.13 | 0.67 |
| transformer at its peak: fused tokens, two taps, stream | 0.04 | 0.17 | 0.88 |
| heads: kept maps | 0.02 | 0.09 | 0.48 |
| heads: a chunk (2 and 8 views: of both dense heads, side by side) | 0.27 | 0.62 | 0.40 |
| outputs (with a graph: its own and the caller's) | 0.04 | 0.17 | 0.44 |
| **peak, with the heads the last and largest stage** | **3.8** | **4.4** | **4.9** |
| **the same with packed weights** (`Any4D.pack_weights_`) | **1.4** | **2.0** | **2.5** |

With packed weights the float32 parameters that stay on the GPU are vectors, position table and small MLPs: 0.03 GB. A
graph's pool is one call's peak, rounded up by the allocator; what a side stream frees serves that stream alone. Until
the finest level was split off, 8 views took 2 x 8 x 75 MB in the heads at once, and 41 views 14 x 75 MB.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import torch

from .config import Any4DConfig, DenseHeadConfig
from .modules.encoder import REGISTERS

GIB = 1 << 30
CPU_HEAD_BYTES = GIB  # what the dense heads may take at once on a CPU
GPU_HEAD_SHARE = 0.5  # of the free memory, for the dense heads on a GPU
GPU_HEAD_IMAGES = 12  # keep a GPU busy with the heads' smallest maps; more at once only take memory
GPU_FINE_IMAGES = 4  # the same for the largest maps: 444 tiles of 128 pixels at four times the grid of 518 x 336
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


def chunk_bytes(config: Any4DConfig, grid: tuple[int, int], itemsize: int, images: int) -> int:
    """Bytes that the heads need for so many images at once on a GPU, their finest level `GPU_FINE_IMAGES` at a time.

    In 32 bits (`itemsize` 4) the finest level is not divided.
    """
    whole = image_bytes(config, grid, itemsize)
    if itemsize > HALF or images <= GPU_FINE_IMAGES:
        return images * whole
    heads = (config.scene.geometry_head, config.scene.flow_head)
    coarse = itemsize * 4 * grid[0] * grid[1] * max(h.feature_dim for h in heads)  # at twice the grid
    fine = max(head_bytes(h, grid, itemsize) for h in heads)
    return images * (whole - fine + coarse) + GPU_FINE_IMAGES * fine


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
        heads=pictures // 2 + kept + outputs + chunk_bytes(config, grid, HALF, batch * chunk),
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
    largest = batch * grid[0] * grid[1] * max(64 * config.scene.geometry_head.feature_dim, 196 * 16)
    limit = min(views, LARGEST_MAP // largest)
    if device.type == "cuda":
        limit = min(limit, max(1, GPU_HEAD_IMAGES // batch))
        patch = config.encoder.patch_size
        outputs = batch * views * output_bytes(grid[0] * patch, grid[1] * patch) if keeps_outputs else 0
        needs = [chunk_bytes(config, grid, itemsize, batch * count) for count in range(1, limit + 1)]
        limit = _fitting(needs, outputs, device, memory_budget)
    else:
        budget = CPU_HEAD_BYTES if memory_budget is None else memory_budget * GIB
        limit = int(min(limit, budget / (batch * image_bytes(config, grid, itemsize, unfused=True))))
    return balanced(views, max(1, limit))


def _fitting(needs: list[int], outputs: int, device: torch.device, memory_budget: float | None) -> int:
    """How many views fit on a GPU beside the outputs; `needs[i]` is what i + 1 views need."""
    if memory_budget is not None:
        room = memory_budget * GIB - torch.cuda.memory_allocated(device) - outputs
    else:
        total = torch.cuda.get_device_properties(device).total_memory
        if not needs or needs[-1] <= UNNOTICED * total or torch.cuda.is_current_stream_capturing():
            return len(needs)
        room = min(GPU_HEAD_SHARE * free_bytes(device), free_bytes(device) - outputs)
    return bisect.bisect_right(needs, room)


def balanced(views: int, limit: int) -> int:
    """Length of chunks, at most `limit`, that divide the views as evenly as can be."""
    chunks = -(-views // limit)
    return -(-views // chunks)
