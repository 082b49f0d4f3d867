"""Arithmetic and memory traffic of a forward pass, counted stage by stage from the configuration.

FLOPs are those of matrix products and convolutions, two for a multiplication with its addition; the rest is counted as
bytes. Bytes are the fewest that a stage must move when each of its passes reads its inputs and weights and writes its
result once: 16-bit operands under autocast, a float32 residual stream, float32 outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import Any4DConfig, DenseHeadConfig
from .modules.encoder import REGISTERS

ENCODER_LINEARS = "image encoder: linears"
ENCODER_ATTENTION = "image encoder: attention"
ENCODER_NORMS = "image encoder: norms"
TOKENIZERS = "tokenizers"
FUSION = "fusion"
LINEARS = "transformer: linears"
GLOBAL = "transformer: global attention"
FRAME = "transformer: frame attention"
NORMS = "transformer: norms"
GEOMETRY_HEAD = "geometry head"
FLOW_HEAD = "flow head"
SMALL_HEADS = "pose and scale heads"
COMPOSITION = "composition"

STAGES = (
    ENCODER_LINEARS, ENCODER_ATTENTION, ENCODER_NORMS, TOKENIZERS, FUSION, LINEARS, GLOBAL, FRAME, NORMS, GEOMETRY_HEAD,
    FLOW_HEAD, SMALL_HEADS, COMPOSITION,
)  # fmt: skip
"""In the order in which data meets them."""

MODALITIES = ("rays", "depth", "poses", "flow")


@dataclass
class Work:
    """What a stage computes and moves."""

    flops: float = 0.0
    bytes: float = 0.0

    def linear(self, rows: float, inputs: int, outputs: int, item: int) -> None:
        """A matrix product of [rows, inputs] with [inputs, outputs]."""
        self.flops += 2.0 * rows * inputs * outputs
        self.bytes += item * (rows * (inputs + outputs) + float(inputs) * outputs)

    def convolution(self, pixels: float, inputs: int, outputs: int, size: int, item: int, read: float = 0) -> None:
        """A convolution with a size x size kernel onto `pixels`, from as many or from `read` pixels."""
        taps = size * size
        self.flops += 2.0 * pixels * inputs * outputs * taps
        self.bytes += item * ((read or pixels) * inputs + pixels * outputs + float(inputs) * outputs * taps)

    def add(self, other: Work) -> None:
        self.flops += other.flops
        self.bytes += other.bytes


@dataclass(frozen=True)
class Call:
    """One kind of call: sizes in patches, and what is given beside images."""

    config: Any4DConfig
    batch: int
    views: int
    rows: int
    columns: int
    modalities: tuple[str, ...] = ()
    item: int = 2  # bytes of a matrix product's operands: 2 under autocast, 4 in float32
    head_item: int = 2  # the same in the dense heads and tokenizers
    patch: int = 14

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    @property
    def images(self) -> int:
        return self.batch * self.views

    @property
    def pixels(self) -> int:
        return self.tokens * self.patch**2


def count(call: Call) -> dict[str, Work]:
    """FLOPs and bytes of every stage in `STAGES`.

    Args:
        call: sizes; `modalities` among `MODALITIES`, each given for all views.

    Raises:
        ValueError: an unknown modality.
    """
    unknown = sorted(set(call.modalities) - set(MODALITIES))
    if unknown:
        raise ValueError(f"modalities: expected some of {', '.join(MODALITIES)}, got {', '.join(unknown)}")
    found = {stage: Work() for stage in STAGES}
    _encoder(call, found)
    _tokenizers(call, found)
    _transformer(call, found)
    _heads(call, found)
    return found


def total(work: dict[str, Work]) -> Work:
    """All stages together."""
    found = Work()
    for part in work.values():
        found.add(part)
    return found


def _blocks(
    linears: Work, norms: Work, rows: float, dim: int, hidden: float, depth: int, item: int, gated: bool = False
) -> None:
    """Linear layers, and the passes over the residual stream, of `depth` blocks."""
    width = (int(hidden) * 2 // 3 + 7) // 8 * 8 if gated else int(hidden)
    for _ in range(depth):
        linears.linear(rows, dim, 3 * dim, item)
        linears.linear(rows, dim, dim, item)
        linears.linear(rows, dim, 2 * width if gated else width, item)
        linears.linear(rows, width, dim, item)
    # Twice a block: read stream and branch, write stream and its LayerNorm.
    norms.bytes += 2 * depth * rows * dim * (4 + item + 4 + item) + rows * dim * (4 + item)


def _encoder(call: Call, found: dict[str, Work]) -> None:
    encoder, item = call.config.encoder, call.item
    dim, length = encoder.dim, call.tokens + 1 + (REGISTERS if encoder.with_registers else 0)
    rows = call.images * length
    linears = found[ENCODER_LINEARS]
    linears.linear(call.images * call.tokens, 3 * call.patch**2, dim, item)
    _blocks(linears, found[ENCODER_NORMS], rows, dim, 4 * dim, encoder.depth, item, encoder.size == "giant")
    attention = found[ENCODER_ATTENTION]
    attention.flops += 4.0 * dim * length**2 * call.images * encoder.depth
    attention.bytes += 4.0 * rows * dim * item * encoder.depth


def _tokenizers(call: Call, found: dict[str, Work]) -> None:
    widths, dim, work = call.config.tokenizers, call.config.encoder.dim, found[TOKENIZERS]
    maps = {"rays": 3, "depth": 1, "flow": 3}
    pixels, item = call.images * call.tokens, call.head_item
    for channels in (count for name, count in maps.items() if name in call.modalities):
        work.convolution(pixels, channels * call.patch**2, widths.dense_dims[0], 3, item)
        for a, b in zip(widths.dense_dims, widths.dense_dims[1:], strict=False):
            work.convolution(pixels, a, b, 3, item)
            work.convolution(pixels, b, b, 3, item)
            if a != b:
                work.convolution(pixels, a, b, 1, item)
        work.linear(pixels, widths.dense_dims[-1], dim, item)
    vectors = {"depth": (1,), "poses": (4, 3, 1)}
    for inputs in (n for name, sizes in vectors.items() if name in call.modalities for n in sizes):
        layers = (inputs, *widths.global_dims, dim)
        for a, b in zip(layers, layers[1:], strict=False):
            work.linear(call.images, a, b, 4)
    dense = sum(name in call.modalities for name in maps)
    found[FUSION].bytes += pixels * dim * 4 * (2 + dense)


def _transformer(call: Call, found: dict[str, Work]) -> None:
    config, item = call.config.transformer, call.item
    dim, inputs = config.dim, call.config.encoder.dim
    sample = call.views * call.tokens + 1
    rows = call.batch * sample
    linears, norms = found[LINEARS], found[NORMS]
    if inputs != dim:
        linears.linear(rows, inputs, dim, item)
    _blocks(linears, norms, rows, dim, dim * config.mlp_ratio, config.depth, item)
    norms.bytes += 2.0 * rows * dim * 4 * len(config.indices or ())
    frame = config.depth // 2 if config.kind == "alternating_attention" else 0
    found[GLOBAL].flops += 4.0 * dim * float(sample) ** 2 * call.batch * (config.depth - frame)
    found[GLOBAL].bytes += 4.0 * rows * dim * item * (config.depth - frame)
    found[FRAME].flops += 4.0 * dim * float(call.tokens) ** 2 * call.images * frame
    found[FRAME].bytes += 4.0 * rows * dim * item * frame


def _heads(call: Call, found: dict[str, Work]) -> None:
    scene, transformer = call.config.scene, call.config.transformer
    dims = (call.config.encoder.dim if transformer.feeds_encoder_map else transformer.dim, *(transformer.dim,) * 3)
    _dense_head(call, scene.geometry_head, dims, found[GEOMETRY_HEAD])
    _dense_head(call, scene.flow_head, dims, found[FLOW_HEAD])
    small = found[SMALL_HEADS]
    if scene.pose_head:
        width = 4 * call.patch**2
        small.linear(call.images * call.tokens, transformer.dim, width, call.head_item)
        for _ in range(3 * scene.num_resconv_block):
            small.linear(call.images * call.tokens, width, width, call.head_item)
        for outputs in (width, width, 7):
            small.linear(call.images, width, outputs, 4)
    small.linear(call.batch, transformer.dim, scene.scale_hidden_dim, 4)
    for _ in range(scene.scale_mlp_layers):
        small.linear(call.batch, scene.scale_hidden_dim, scene.scale_hidden_dim, 4)
    small.linear(call.batch, scene.scale_hidden_dim, 1, 4)
    raw = scene.geometry_head.output_dim + scene.flow_head.output_dim
    outputs = 4 * (3 + 3 + 3 + 1 + 3) + (4 if scene.confidence else 0) + (5 if scene.mask else 0)
    found[COMPOSITION].bytes += call.images * call.pixels * (4 * raw + outputs)


def _dense_head(call: Call, head: DenseHeadConfig, dims: tuple[int, ...], work: Work) -> None:
    """DPT: four maps at 4, 2, 1 and 1/2 times the patch grid, fusion from coarse to fine, regression."""
    item, n, features = call.head_item, call.images, head.feature_dim
    half = -(-call.rows // 2) * -(-call.columns // 2)
    sizes = [n * 16 * call.tokens, n * 4 * call.tokens, n * call.tokens, n * half]
    base = n * call.tokens
    widths = head.layer_dims
    for dim, width in zip(dims, widths, strict=True):
        work.linear(base, dim, width, item)
    for level, stride in ((0, 4), (1, 2)):  # transposed convolutions whose kernel is their stride
        work.linear(base, widths[level], widths[level] * stride**2, item)
    work.convolution(sizes[3], widths[3], widths[3], 3, item, read=base)
    for level, width in enumerate(widths):
        work.convolution(sizes[level], width, features, 3, item)
        for _ in range(2 if level == 3 else 4):
            work.convolution(sizes[level], features, features, 3, item)
        work.linear(sizes[level], features, features, item)
    first, second = head.hidden_dims or (features // 2, features // 2)
    work.convolution(n * 64 * call.tokens, features, first, 3, item)
    work.flops += 2.0 * n * call.pixels * (first * second * 9 + second * head.output_dim)
    # The resize, its convolution and the 1x1 one behind are one pass: small map in, raw channels out.
    work.bytes += item * n * 64 * call.tokens * first + 4 * n * call.pixels * head.output_dim
