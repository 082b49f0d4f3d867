"""Somebody else's training loop on `any4d_fast.ops` alone: depth and world points of tilted planes from three views.

Its own model, data and loss; nothing else of any4d_fast. `python examples/train_with_ops.py --steps 150`: on a CPU it
takes seconds.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from any4d_fast import ops

BATCH, VIEWS, SIDE, PATCH, DIM, HEADS = 4, 3, 28, 7, 64, 2
GRID = SIDE // PATCH


def clips(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [B, V, 3, H, W], z-depth [B, V, H, W] in metres, pinhole matrix [3, 3], camera-to-world [B, V, 4, 4]."""
    k = torch.tensor([[SIDE, 0, SIDE / 2 - 0.5], [0, SIDE, SIDE / 2 - 0.5], [0, 0, 1]], device=device)
    poses = torch.eye(4, device=device).repeat(BATCH, VIEWS, 1, 1)
    poses[:, 1:, :3, 3] = 0.3 * torch.randn(BATCH, VIEWS - 1, 3, device=device)  # the first camera is the world's
    normal = torch.cat([0.4 * torch.randn(BATCH, 1, 2, device=device), torch.ones(BATCH, 1, 1, device=device)], -1)
    rays = ops.unproject(torch.ones(SIDE, SIDE, device=device), k, torch.eye(4, device=device))[0]  # [H, W, 3]
    distance = 2 + torch.rand(BATCH, 1, device=device) - (normal * poses[..., :3, 3]).sum(-1)  # [B, V]
    depth = distance[..., None, None] / torch.einsum("bvc,hwc->bvhw", normal, rays).clamp(min=0.3)
    points = ops.unproject(depth, k, poses)[0]  # [B, V, H, W, 3]
    images = torch.sin(4 * points).movedim(-1, 2) / depth[:, :, None]  # a pattern on the plane, darker farther away
    return images, depth, k, poses


class Block(nn.Module):
    """Attention and MLP on rows; the LayerNorm of the next branch comes with every addition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.fc1, self.fc2 = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor, segments: ops.Segments) -> Tensor:
        y = ops.layer_norm(x, self.norm1.weight, self.norm1.bias)
        out = ops.attention(self.qkv(y).view(-1, 3, HEADS, DIM // HEADS), segments=segments)
        x, y = ops.residual_norm(x, self.proj(out.flatten(1)), None, self.norm2.weight, self.norm2.bias)
        return ops.linear_residual(
            ops.linear_gelu(y, self.fc1.weight, self.fc1.bias), self.fc2.weight, self.fc2.bias, x
        )


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(GRID * GRID, DIM))
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.head = nn.Linear(DIM, PATCH * PATCH)

    def forward(self, images: Tensor, k: Tensor, poses: Tensor) -> tuple[Tensor, Tensor]:
        """Z-depth [B, V, H, W] and world points [B, V, H, W, 3], in metres."""
        batch, views = images.shape[:2]
        tokens = ops.tokenize(images.flatten(0, 1), self.patches.weight, self.patches.bias, self.positions)
        frame = ops.Segments.frame(batch, views, GRID * GRID, extra=0)  # each view by itself
        overall = ops.Segments.global_(batch, views * GRID * GRID)  # all views of a clip
        x = tokens.flatten(0, 1)
        for i, block in enumerate(self.blocks):
            x = block(x, overall if i % 2 else frame)
        maps = self.head(x).view(batch, views, GRID, GRID, PATCH, PATCH).transpose(3, 4)
        depth = 3 * maps.reshape(batch, views, SIDE, SIDE).exp()
        return depth, ops.unproject(depth, k, poses)[0]


def main(steps: int, device: str) -> list[float]:
    torch.manual_seed(0)
    model = Model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        images, depth, k, poses = clips(device)
        predicted, points = model(images, k, poses)
        target = ops.unproject(depth, k, poses)[0]
        loss = (predicted.log() - depth.log()).abs().mean() + 0.1 * (points - target).norm(dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 25 == 0 or step + 1 == steps:
            print(f"step {step:4d}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    main(options.steps, options.device)
