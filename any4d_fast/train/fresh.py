"""What a model starts from that has no weights yet, where its modules' own initialisation is not the best for training.

Upstream starts from DINOv2's weights, so that how its encoder is initialised never matters. Here it does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config import DENSE_PARTS
from ..model import Any4D
from ..modules.block import Block
from ..modules.encoder import TRAINED_GRID

_AMPLITUDE = 0.5  # about that of a new patch projection's tokens: neither drowns the other
# In patches of the table. The longest tells both ends of a picture apart; the shortest is still sampled twice a period
# when the table is resized to the nine rows of a picture 126 pixels high.
_LONGEST, _SHORTEST = 4.0 * TRAINED_GRID, 2.0 * TRAINED_GRID / 9
_LAST_GAIN = 0.1  # on the weights of layers that give outputs
# Raw channels, before the adaptors: depth is an exponential.
_USUAL = {
    "points": (0.0, 0.0, 1.0),
    "ray_origins": (0.0, 0.0, 0.0),
    "ray_directions": (0.0, 0.0, 1.0),
    "depth": (0.0,),
}


def sinusoidal_grid(dim: int) -> Tensor:
    """[37 * 37, dim] sines and cosines of the row in the first half of the channels, of the column in the second.

    Wavelengths fall geometrically, as in arXiv 1706.03762.

    Raises:
        ValueError: a width that is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim: expected a multiple of 4 (sine and cosine of rows and columns), got {dim}")
    lengths = _LONGEST * (_SHORTEST / _LONGEST) ** torch.linspace(0, 1, dim // 4, dtype=torch.float64)
    place = torch.arange(TRAINED_GRID, dtype=torch.float64) - (TRAINED_GRID - 1) / 2
    angle = 2 * math.pi * place[:, None] / lengths
    waves = torch.cat([angle.sin(), angle.cos()], 1)  # [37, dim / 2]
    shape = (TRAINED_GRID, TRAINED_GRID, dim // 2)
    return torch.cat([waves[:, None].expand(shape), waves[None].expand(shape)], -1).flatten(0, 1).float()


@torch.no_grad()
def prepare(model: Any4D, unused: tuple[str, ...]) -> None:
    """Give a new model positions and keys that can match between views, and heads that begin at usual values.

    Tokenizers that are not trained add nothing.

    Args:
        model: changed in place.
        unused: prefixes of the parameters of tokenizers of inputs that are never given: random ones would spoil the
            result of giving that input.
    """
    _prepare_matching(model)
    _prepare_heads(model)
    for name, parameter in model.named_parameters():
        if name.startswith(unused):
            parameter.zero_()


def _prepare_matching(model: Any4D) -> None:
    """Pose and flow are made of where a match lies.

    With positions as small as DINOv2's random ones (0.02) attention sees colours only for the first thousands of steps,
    so the table starts as sines and cosines. Keys start equal to queries, which makes a token attend to those that
    resemble it, wherever they are ("mimetic" initialisation, arXiv 2305.09828).
    """
    table = model.encoder.model.pos_embed  # [1, 1 + 37 * 37, C], the class token's first
    table[0, 1:] = _AMPLITUDE * sinusoidal_grid(table.shape[-1]).to(table)
    for block in model.info_sharing.self_attention_blocks:
        assert isinstance(block, Block)
        queries, keys, _ = block.attn.qkv.weight.chunk(3)
        keys.copy_(queries)


def _prepare_heads(model: Any4D) -> None:
    """First outputs near what is usual: rays ahead, depth 1, no motion, no turn, a scale of metres in a room.

    From PyTorch's initialisation every pixel asks for the same change for hundreds of steps. AdamW then moves every
    parameter behind it by several times its size, most ReLUs of the last layers end below zero for all inputs, and the
    flow's head stays at zero motion, which most pixels have.
    """
    values = [v for part in DENSE_PARTS[model.config.scene.representation] for v in _USUAL[part]]
    flags = [0.0] * model.config.scene.confidence + [2.0] * model.config.scene.mask
    for head, usual in ((model.dpt_regressor_head, values + flags), (model.scene_flow_dpt_regressor_head, [0.0] * 3)):
        hidden, last = head.conv2[0], head.conv2[2]
        assert isinstance(hidden, nn.Conv2d) and isinstance(last, nn.Conv2d)
        for conv in (head.conv1, hidden):
            assert conv.bias is not None
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        _begin_at(last, usual)
    if model.config.scene.pose_head:
        _begin_at(model.pose_head.fc_t, [0.0] * 3)
        _begin_at(model.pose_head.fc_rot, [0.0, 0.0, 0.0, 1.0])
    _begin_at(model.scale_head.output_proj, [1.0])


def _begin_at(layer: nn.Linear | nn.Conv2d, values: list[float]) -> None:
    """Outputs close to `values`."""
    assert layer.bias is not None
    layer.weight.mul_(_LAST_GAIN)
    layer.bias.copy_(torch.tensor(values))
