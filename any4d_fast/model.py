"""Any4D: N views in; depth, cameras, world points and scene flow out, in metres (arXiv 2512.10935)."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import graphs, head_precision, ops
from .checkpoint import (
    find_checkpoint,
    load_checkpoint,
    load_submodules,
    load_tensors,
    read_state_dict,
    stored_config,
)
from .config import Any4DConfig, ModalityConfig, preset
from .config_upstream import Config, from_upstream, to_upstream
from .devices import find_device
from .geometry_tokens import encoded
from .head_loop import Finish, Outputs, check_minibatch, dtype_of_heads, run_heads
from .modules import host_weights
from .modules.block import NORM_EPS, Block
from .modules.derived import Derived
from .modules.dpt import DPTFeatures, DPTRegressor
from .modules.encoder import ImageEncoder, VisionTransformer, grid_of
from .modules.heads import PoseHead, ScaleHead
from .modules.modalities import ModalityReader, View
from .modules.multiview import MultiViewTransformer
from .modules.tokenizers import DenseTokenizer, VectorTokenizer
from .precision import EXACT
from .precision import check as check_precision

__all__ = ["Any4D", "Outputs"]


class Any4D(nn.Module):
    """The drop-in model: upstream's constructor, state dict and forward.

    Data flow, token-major from end to end (T patches a view, V views, B samples):
    images -> encoder -> + tokenized geometric inputs -> fused tokens [B, V*T + 1, C] (scale token last)
    -> multi-view transformer -> dense heads on four maps, pose head, scale head -> factors of the scene.
    """

    def __init__(
        self,
        name: str,
        encoder_config: Config,
        info_sharing_config: Config,
        pred_head_config: Config,
        scene_flow_pred_head_config: Config,
        geometric_input_config: Config,
        fusion_norm_layer: Any = None,
        pretrained_checkpoint_path: str | os.PathLike[str] | None = None,
        load_specific_pretrained_submodules: bool = False,
        specific_pretrained_submodules: list[str] | None = None,
        torch_hub_force_reload: bool = False,
    ) -> None:
        """Upstream's arguments, as they are (github.com/Any-4D/Any4D, any4d/models/any4d/model.py).

        Weights are never downloaded here: `torch_hub_force_reload` and the encoder's `uses_torch_hub` have no effect,
        and the model starts from random weights unless `pretrained_checkpoint_path` is given.

        Raises:
            ConfigError: for an option that is unknown or not supported; the message names it.
            CheckpointError: when the checkpoint cannot be loaded.
        """
        super().__init__()
        self.config = from_upstream(
            name,
            encoder_config,
            info_sharing_config,
            pred_head_config,
            scene_flow_pred_head_config,
            geometric_input_config,
        )
        self.class_init_args: dict[str, Any] = copy.deepcopy(
            {
                "name": name,
                "encoder_config": dict(encoder_config),
                "info_sharing_config": dict(info_sharing_config),
                "pred_head_config": dict(pred_head_config),
                "scene_flow_pred_head_config": dict(scene_flow_pred_head_config),
                "geometric_input_config": dict(geometric_input_config),
            }
        )
        self.name = name
        self._build(self.config, fusion_norm_layer)
        self._graphs = graphs.GraphCache()
        for part, path in (
            (self.encoder, self.config.encoder.pretrained_checkpoint_path),
            (self.info_sharing, self.config.transformer.pretrained_checkpoint_path),
        ):
            if path is not None:
                load_checkpoint(part, path)
        if pretrained_checkpoint_path is not None:
            if load_specific_pretrained_submodules:
                load_submodules(self, pretrained_checkpoint_path, specific_pretrained_submodules)
            else:
                load_checkpoint(self, pretrained_checkpoint_path)

    def _build(self, config: Any4DConfig, fusion_norm_layer: Any) -> None:
        encoder, transformer, scene, widths = config.encoder, config.transformer, config.scene, config.tokenizers
        dim, patch = encoder.dim, encoder.patch_size
        self.encoder = ImageEncoder(encoder)
        self.ray_dirs_encoder = DenseTokenizer(3, dim, patch, widths.dense_dims)
        self.depth_encoder = DenseTokenizer(1, dim, patch, widths.dense_dims)
        self.depth_scale_encoder = VectorTokenizer(1, dim, widths.global_dims)
        self.cam_rot_encoder = VectorTokenizer(4, dim, widths.global_dims)
        self.cam_trans_encoder = VectorTokenizer(3, dim, widths.global_dims)
        self.cam_trans_scale_encoder = VectorTokenizer(1, dim, widths.global_dims)
        self.scene_flow_encoder = DenseTokenizer(3, dim, patch, widths.dense_dims)
        norm = nn.LayerNorm(dim, eps=NORM_EPS) if fusion_norm_layer is None else fusion_norm_layer(dim)
        if not isinstance(norm, nn.LayerNorm):
            raise TypeError(f"fusion_norm_layer: expected a function that makes an nn.LayerNorm, got {type(norm)}")
        self.fusion_norm_layer = norm
        self.scale_token = nn.Parameter(torch.zeros(dim))
        nn.init.trunc_normal_(self.scale_token, std=0.02)
        self.info_sharing = MultiViewTransformer(transformer, dim)
        maps = (dim if transformer.feeds_encoder_map else transformer.dim, *(transformer.dim,) * 3)
        self.dpt_feature_head = DPTFeatures(scene.geometry_head, maps)
        self.dpt_regressor_head = DPTRegressor(scene.geometry_head)
        self.dense_head = nn.Sequential(self.dpt_feature_head, self.dpt_regressor_head)  # alias in the state dict
        self.scene_flow_dpt_feature_head = DPTFeatures(scene.flow_head, maps)
        self.scene_flow_dpt_regressor_head = DPTRegressor(scene.flow_head)
        self.scene_flow_dense_head = nn.Sequential(self.scene_flow_dpt_feature_head, self.scene_flow_dpt_regressor_head)
        if scene.pose_head:
            self.pose_head = PoseHead(transformer.dim, patch, scene.num_resconv_block)
        self.scale_head = ScaleHead(transformer.dim, scene.scale_hidden_dim, scene.scale_mlp_layers)

    @classmethod
    def from_config(cls, config: Any4DConfig) -> Any4D:
        """A model with random weights from a typed configuration."""
        return cls(**to_upstream(config))

    @classmethod
    def from_preset(cls, name: str) -> Any4D:
        """A model with random weights: "any4d" (the released architecture), "any4d-base" or "tiny".

        Trained weights of "tiny" come with the package: `from_pretrained("tiny")`.

        Raises:
            ConfigError: for an unknown name.
        """
        return cls.from_config(preset(name))

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        config: Any4DConfig | str | None = None,
        strict: bool = True,
        device: torch.device | str | None = None,
        weights: str = "float32",
    ) -> Any4D:
        """A model with weights from a file or a Hugging Face repository.

        Args:
            source: `.pth` as upstream saves it ({"model": state dict}; read with `weights_only=True`),
                `.safetensors`, a folder that holds one, or a Hugging Face id. "tiny", where no file or folder has that
                name: the trained weights that come with the package (synthetic rooms only).
            config: configuration or preset; that stored with the weights, else "any4d", by default.
            strict: False loads what fits and logs every key that does not.
            device: where to put the model.
            weights: "float32", or "packed" for a GPU that holds 16-bit copies alone: see `pack_weights_`.

        Raises:
            CheckpointError: the message names the file and the key; the model is not half-loaded.
            ValueError: unknown `weights`, or no such device here.
        """
        if weights not in ("float32", "packed"):
            raise ValueError(f'weights: expected "float32" or "packed", got {weights!r}')
        target = None if device is None else find_device(device)
        path = find_checkpoint(source)
        tensors = read_state_dict(path)  # before the model is built: a broken file should fail at once
        chosen = stored_config(path) if config is None else config
        model = cls.from_config(preset(chosen) if isinstance(chosen, str) else chosen)
        load_tensors(model, tensors, path, strict=strict)
        if weights == "packed":
            return model.eval().pack_weights_(target)
        return (model if target is None else model.to(target)).eval()

    def forward(
        self,
        views: list[View],
        *,
        minibatch_size: int | None = None,
        cuda_graphs: bool | None = None,
        precision: str = EXACT,
    ) -> list[Outputs]:
        """Reconstruct.

        Args:
            views: one dictionary a view, view 0 the reference. `img` [B, 3, H, W] normalised for the encoder, H and W
                multiples of 14; `data_norm_type` (["dinov2"]); optionally `ray_directions_cam` [B, H, W, 3] unit
                vectors in the camera frame, `depth_along_ray` [B, H, W, 1] (0: unknown), `camera_pose_quats` [B, 4]
                (x, y, z, w) and `camera_pose_trans` [B, 3] camera-to-world in OpenCV axes, `is_metric_scale` [B] bool,
                `radial_scene_flow` [B, H, W, 3] (needs view 0's `pts3d_cam` [B, H, W, 3] and `valid_mask` [B, H, W]).
            minibatch_size: views that the dense heads take at once; by default what fits into memory, all when
                gradients are wanted. Results do not depend on it beyond rounding.
            cuda_graphs: replay a captured CUDA graph: where it pays (None), at any size (True), never (False); see
                `any4d_fast.graphs`. Training and torch.compile never do.
            precision: "exact", or "fp8" for 8-bit attention and linear layers in encoder and multi-view transformer:
                inference under 16-bit autocast on Hopper or newer; see `any4d_fast.precision`.

        Returns:
            One dictionary a view, with `pts3d` (metres, world = view 0's camera), `pts3d_cam`, `ray_directions`,
            `depth_along_ray`, `cam_trans`, `cam_quats`, `scene_flow` (on view 0's pixels, world axes),
            `metric_scaling_factor`, `conf`, `non_ambiguous_mask`, `non_ambiguous_mask_logits`, as far as the scene
            representation has them.

        Raises:
            ValueError: for views that disagree in size or batch, or lack what another input needs; `minibatch_size` is
                less than one.
            PrecisionError: `precision` cannot run this call; the message says why.
        """
        return self.run(views, self.config.modalities, minibatch_size, cuda_graphs=cuda_graphs, precision=precision)

    def run(
        self,
        views: list[View],
        modalities: ModalityConfig,
        minibatch_size: int | None,
        finish: Finish | None = None,
        memory_budget: float | None = None,
        cuda_graphs: bool | None = None,
        precision: str = EXACT,
    ) -> list[Outputs]:
        """`forward` with other modality probabilities than the configuration's (`infer` gives its own).

        `finish` and `memory_budget` are those of `head_loop.run_heads`; a call with `finish` takes no CUDA graph.
        """
        grid = self._check(views)
        check_minibatch(minibatch_size)
        check_precision(precision, self, views[0]["img"])

        def reconstruct(given: list[View]) -> list[Outputs]:
            return self._reconstruct(given, modalities, grid, minibatch_size, finish, memory_budget, precision)

        if finish is not None or torch.compiler.is_compiling():
            return reconstruct(views)
        choice = graphs.wanted(cuda_graphs)
        if graphs.reasons(self, views, modalities, choice):
            return reconstruct(views)
        image = views[0]["img"]
        heads = head_precision.head_dtype(image, torch.is_autocast_enabled(image.device.type))
        key = graphs.call_key(views, modalities, minibatch_size, memory_budget, heads, precision)
        return self._graphs.run(self, key, views, reconstruct, at_once=choice is True)

    def _reconstruct(
        self,
        views: list[View],
        modalities: ModalityConfig,
        grid: tuple[int, int],
        minibatch_size: int | None,
        finish: Finish | None,
        memory_budget: float | None,
        precision: str,
        narrow_inputs: bool = True,
    ) -> list[Outputs]:
        """The call itself; `narrow_inputs` lets the dense tokenizers run in 16 bits."""
        image = views[0]["img"]
        dtype = dtype_of_heads(self, image)
        flags = None
        # Where something is drawn at random, running again would draw anew.
        if narrow_inputs and dtype in head_precision.NARROW and not self.training and graphs.decided(modalities):
            flags = head_precision.Flags(image.device)
        tokens = self._tokens(views, modalities, dtype, flags, precision)
        taps, final = self.info_sharing(tokens, len(views), precision)
        if self.config.transformer.indices is None:
            taps = [final, final]
        maps = [tokens, *taps, final] if self.config.transformer.feeds_encoder_map else [*taps, final]
        del tokens, taps, final
        outputs = run_heads(self, maps, len(views), grid, minibatch_size, finish, memory_budget, flags)
        if outputs is not None:
            return outputs
        del maps
        settings = (minibatch_size, finish, memory_budget, precision)
        return self._reconstruct(views, modalities, grid, *settings, narrow_inputs=False)

    def _check(self, views: list[View]) -> tuple[int, int]:
        """Validate images and return the patch grid."""
        if not views:
            raise ValueError("views: expected at least one view, got none")
        for i, view in enumerate(views):
            if "img" not in view:
                raise ValueError(f"views[{i}]: expected the key 'img', got {sorted(view)}")
        shape = views[0]["img"].shape
        for i, view in enumerate(views):
            image = view["img"]
            if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
                raise ValueError(
                    f"views[{i}]['img']: expected float [B, 3, H, W], got {image.dtype} {list(image.shape)}; "
                    "model.infer takes other layouts"
                )
            if image.shape != shape:
                raise ValueError(
                    f"views[{i}]['img']: all views need one shape, got {list(image.shape)} and {list(shape)} in view 0"
                )
            kinds = view.get("data_norm_type", self.encoder.data_norm_type)
            kinds = [kinds] if isinstance(kinds, str) else list(kinds)  # one for all samples, or one for each
            if set(kinds) != {self.encoder.data_norm_type}:
                raise ValueError(
                    f"views[{i}]['data_norm_type']: the encoder expects {self.encoder.data_norm_type!r}, got "
                    f"{kinds[0] if len(set(kinds)) == 1 else kinds!r}"
                )
        return grid_of(shape[2], shape[3], self.encoder.patch_size)

    def _tokens(
        self,
        views: list[View],
        modalities: ModalityConfig,
        dtype: torch.dtype,
        flags: head_precision.Flags | None,
        precision: str,
    ) -> Tensor:
        """Images and geometric inputs -> fused tokens [B, V*T + 1, C], the scale token last.

        With flags the dense tokenizers run in `dtype`.
        """
        images = torch.cat([view["img"] for view in views])  # [V * B, 3, H, W]
        reader = ModalityReader(modalities, views, self.training)
        encode = self.encoder if precision == EXACT else functools.partial(self.encoder, precision=precision)
        image_tokens, geometry = encoded(self, reader, images, encode, dtype, flags)  # [V * B, T, C]
        # Fusion stays in full precision, as upstream does it.
        with torch.autocast(images.device.type, enabled=False):
            norm = self.fusion_norm_layer
            return ops.fuse_tokens(
                image_tokens,
                geometry.dense,
                geometry.vectors,
                norm.weight,
                norm.bias,
                norm.eps,
                dense_masks=geometry.dense_masks,
                vector_masks=geometry.vector_masks,
                scale_token=self.scale_token,
                batch=views[0]["img"].shape[0],
                out_dtype=image_tokens.dtype,
            )

    def refresh(self) -> None:
        """Cast and fold the inference weights anew at the next call.

        Changes of parameters are seen by themselves: optimizer steps, `load_state_dict`, any in-place operation, a new
        tensor in a parameter's place. Only writes through `parameter.data`, and those of a training step that is
        replayed as a CUDA graph, are not, and need this (or `train()`; `infer` on a model in training mode sees them).
        """
        for kept in self._stores():
            kept.invalidate()

    def train(self, mode: bool = True) -> Any4D:
        super().train(mode)
        if mode:
            self.refresh()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._graphs.drop_stale(self)
        for kept in self._stores():
            kept.drop_stale()
        return self

    def _stores(self) -> Iterator[Derived]:
        """What all parts of the model keep of their weights."""
        for module in self.modules():
            if isinstance(kept := getattr(module, "derived", None), Derived):
                yield kept

    def pack_weights_(self, device: torch.device | str | None = None) -> Any4D:
        """Keep only 16-bit copies of the matrices on the GPU, for inference under autocast; returns the model.

        The parameters themselves, in full precision, move to host memory: 2.4 of 2.45 GB of the released architecture.
        Their copies (1.03 GB for images alone, 0.18 GB more once dense inputs are given) are made at the next call,
        which takes about a second longer. Outputs are the same bits.

        `state_dict` gives full precision, `load_state_dict` and edits in place are seen as ever. A call without
        autocast, in training or with gradients raises and says so. Where a value leaves the range of 16 bits, or heads
        are to run in float32, theirs or the tokenizers' parameters are copied to the GPU for that call. `.to(device)`
        moves every parameter, as always, and ends this state, and so does `unpack_weights_`; `train()` moves nothing.

        Args:
            device: where to compute; where the model is by default.

        Raises:
            ValueError: no such device here.
        """
        target = self.scale_token.device if device is None else find_device(device)
        self._graphs.clear()
        host_weights.pack_(self, target)
        return self._forget_derived()

    def unpack_weights_(self) -> Any4D:
        """Bring every parameter back to where the model computes, as the objects that they are; returns the model."""
        self._graphs.clear()
        host_weights.unpack_(self)
        return self._forget_derived()

    def _forget_derived(self) -> Any4D:
        for kept in self._stores():
            kept.clear()
        if self.scale_token.is_cuda:
            torch.cuda.empty_cache()
        return self

    def recompute_activations(self, *parts: str) -> None:
        """Choose what a training step computes twice instead of keeping it for the backward pass.

        Gradients are the same. Peaks of a step of 24 views of 518 x 336 (released architecture, bfloat16 autocast, one
        sample; weights and their gradients included, optimizer states not), measured on an H200:

        | parts | GB | computed again |
        |---|---|---|
        | none | 46.2 | |
        | "mlp": the hidden rows of every transformer block's MLP | 31.2 | 0.28 TFLOP a view |
        | "heads": all of the dense heads | 41.8 | 0.40 TFLOP a view |
        | "mlp", "heads" | 26.5 | 0.68 TFLOP a view |
        | "blocks", "heads": all of the transformer blocks but their inputs too | 10.8 | a forward pass |

        Heads were recomputed for six images at once in these; twelve, as they are now, took 0.7 more in the same step.

        All this with the dense heads in float16 (`any4d_fast.head_precision`). In TF32 they keep twice as much, and are
        recomputed block by block.

        Args:
            parts: any of "mlp", "blocks" and "heads"; none to keep everything. The configuration's options
                `gradient_checkpointing` and `checkpoint_gradient` set "blocks" and "heads" for parts of the model.

        Raises:
            ValueError: for another name.
        """
        wrong = sorted(set(parts) - {"mlp", "blocks", "heads"})
        if wrong:
            raise ValueError(f"parts: expected 'mlp', 'blocks' or 'heads', got {wrong}")
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute_mlp = "mlp" in parts and "blocks" not in parts
            elif isinstance(module, (VisionTransformer, MultiViewTransformer)):
                module.gradient_checkpointing = "blocks" in parts
            elif isinstance(module, (DPTFeatures, DPTRegressor)):
                module.checkpoint_gradient = "heads" in parts

    def infer(self, views: list[View], **options: Any) -> list[Outputs]:
        """Reconstruct from what a person has; see `any4d_fast.inference.infer` for every option."""
        from .inference import infer

        return infer(self, views, **options)
