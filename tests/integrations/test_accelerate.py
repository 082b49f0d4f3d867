"""What `accelerate` leaves as it is: state dict, optimizers, hooks, copies, and the model after undoing it."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from any4d_fast import Any4D, accelerate, deaccelerate
from any4d_fast.integrations import Kept, Report, Swapped, checks
from any4d_fast.testing import relative_error
from tests.accelerate_cases import TINY, lively, pair, parameters
from tests.model_twins import TimmBlock, TimmTransformer, VggtAggregator, VggtHead, stands_in_for
from tests.oracles import FORWARD_BUDGET, dinov2, needs_oracles, upstream

DIM, HEADS = 64, 2


def transformer(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return lively(TimmTransformer(2, DIM, HEADS, **options))


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, 5, DIM, generator=torch.Generator().manual_seed(0))


def kept(report: Report) -> dict[str, str]:
    return {line.path: line.reason for line in report.kept}


@pytest.mark.parametrize("name", parameters())
def test_nothing_but_classes_changes_and_they_come_back(name: str) -> None:
    model = pair(name).theirs
    classes = {path: type(module) for path, module in model.named_modules()}
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    state = {key: (id(value), value.data_ptr()) for key, value in model.state_dict(keep_vars=True).items()}
    report = accelerate(model)
    assert accelerate(model).swapped == report.swapped
    assert {k: (id(v), v.data_ptr()) for k, v in model.state_dict(keep_vars=True).items()} == state
    swapped = {line.path for line in report.swapped}
    for path, module in model.named_modules():
        assert isinstance(module, classes[path]) and (type(module) is not classes[path]) == (path in swapped)
    assert set(deaccelerate(model)) == swapped and deaccelerate(model) == []
    assert {path: type(module) for path, module in model.named_modules()} == classes
    for path, module in model.named_modules():
        assert list(vars(module)) == list(attributes[path])
        assert all(vars(module)[key] is value for key, value in attributes[path].items())


def test_report() -> None:
    report = accelerate(transformer())
    block = "timm.models.vision_transformer.Block"
    assert Swapped("blocks.1", block, "layer_norm, residual_norm") in report.swapped
    assert [s.path for s in report.swapped][:2] == ["norm", "blocks.0"] and len(report.swapped) == 7
    lines = str(report).splitlines()
    assert lines[0] == "7 modules swapped, 0 kept"
    assert "2        blocks.0.attn  Attention  attention" in lines


def test_a_model_of_nobody_that_is_known() -> None:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, batch_first=True)
    model = nn.Sequential(nn.LayerNorm(DIM), layer, nn.Linear(DIM, DIM), nn.GELU())
    classes = [type(module) for module in model.modules()]
    report = accelerate(model)
    assert report == Report() and str(report) == "nothing swapped: no module of a known family"
    assert [type(module) for module in model.modules()] == classes and deaccelerate(model) == []
    assert accelerate(Any4D.from_preset("tiny")) == Report()
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got OrderedDict"):
        accelerate(model.state_dict())  # type: ignore[arg-type]


def test_importing_it_imports_no_package_of_a_family() -> None:
    code = (
        "import sys, any4d_fast; assert 'any4d_fast.integrations' not in sys.modules; any4d_fast.accelerate;"
        "print([m for m in ('timm', 'uniception', 'dinov2', 'vggt', 'torchvision') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_optimizer_made_before_goes_on() -> None:
    model = transformer()
    reference = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, reference)]
    accelerate(model)
    for _ in range(3):
        for module, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            module(tokens()).square().mean().backward()
            optimizer.step()
    # Adam divides by the size of a gradient: where that is rounding alone (a key's bias), a step may be any.
    assert relative_error(model(tokens()), reference(tokens())) <= 10 * FORWARD_BUDGET


def test_copies_and_pickles() -> None:
    model = pair("dinov2").ours if _oracles() else transformer()
    accelerate(model)  # does nothing to what is accelerated
    x = torch.randn(1, 3, 28, 42) if _oracles() else tokens()
    expected = model(x)
    twins = [copy.deepcopy(model)]
    if _oracles():
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        twins += [pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    for twin in twins:
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(twin(x), expected) and not {*twin.parameters()} & {*model.parameters()}
        assert len(deaccelerate(twin)) == len(accelerate(model).swapped)
        assert relative_error(twin(x), expected) <= FORWARD_BUDGET


def _oracles() -> bool:
    return not needs_oracles.args[0]


def test_weights_loaded_and_moved_afterwards() -> None:
    model, other = transformer(), lively(TimmTransformer(2, DIM, HEADS))
    accelerate(model)
    model.load_state_dict(other.state_dict())
    assert relative_error(model(tokens()), other(tokens())) <= FORWARD_BUDGET
    result = model.double()(tokens().double())
    assert result.dtype == torch.float64
    assert relative_error(result, other.double()(tokens().double())) <= 1e-12
    half = model.to(torch.bfloat16)(tokens().bfloat16())
    assert half.dtype == torch.bfloat16 and relative_error(half, result) <= 2**-5  # a few roundings of 2^-8


def test_hooks_fire_wherever_they_are() -> None:
    model = transformer()
    accelerate(model)
    expected, seen = model(tokens()), []
    for path, module in model.named_modules():
        module.register_forward_hook(lambda module, args, out, path=path: seen.append(path))
    assert relative_error(model(tokens()), expected) <= FORWARD_BUDGET
    never = ("fc_norm", "attn_drop")  # nor does the original call them
    assert set(seen) == {path for path, _ in model.named_modules() if not path.endswith(never)}


def test_an_adapter_put_in_afterwards_is_used() -> None:
    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model, reference = transformer(), transformer()
    accelerate(model)
    for module in (model, reference):
        for path in ("mlp.fc1", "attn.qkv", "attn.proj"):
            old = module.get_submodule(f"blocks.0.{path}")
            adapter = Adapter(old.in_features, old.out_features)
            adapter.load_state_dict(old.state_dict())
            module.set_submodule(f"blocks.0.{path}", adapter)
    assert relative_error(model(tokens()), reference(tokens())) <= FORWARD_BUDGET


@pytest.mark.parametrize("options", [{"drop": 0.3}, {"drop_path": 0.5}, {"attn_drop": 0.3}, {"qk_norm": True}])
def test_dropout_and_stochastic_depth_draw_the_same_numbers(options: dict[str, Any]) -> None:
    model, reference = transformer(**options), transformer(**options)
    accelerate(model)
    for train in (True, False):
        found = []
        for module in (model.train(train), reference.train(train)):
            torch.manual_seed(1)
            found.append(module(tokens(6)))
        assert relative_error(*found) <= FORWARD_BUDGET


@needs_oracles
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_dinov2_drops_the_same_samples(rate: float) -> None:
    model = lively(dinov2("dinov2_vits14", depth=2))
    block = type(model.blocks[0])
    for index in range(2):
        model.blocks[index] = block(384, 6, init_values=1.0, drop_path=rate, attn_class=type(model.blocks[index].attn))
    reference = copy.deepcopy(model)
    accelerate(model)
    found = []
    for module in (model.train(), reference.train()):
        torch.manual_seed(4)
        found.append(module.forward_features(torch.randn(6, 3, 28, 28))["x_prenorm"])
    assert relative_error(*found) <= FORWARD_BUDGET


@needs_oracles
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_uniceptions_block_with_positions_and_stochastic_depth(rate: float) -> None:
    blocks = upstream("utils.transformer_blocks")
    torch.manual_seed(0)
    model = lively(
        blocks.SelfAttentionBlock(
            DIM, HEADS, qk_norm=True, drop_path=rate, custom_positional_encoding=lambda x, where: x + where
        )
    )
    reference = copy.deepcopy(model)
    assert not accelerate(model).kept
    where, found = torch.randn(6, HEADS, 5, DIM // HEADS), []
    for module in (model.train(), reference.train()):
        torch.manual_seed(1)
        found.append(module(tokens(6), where))
    assert relative_error(*found) <= FORWARD_BUDGET
    with pytest.raises(AssertionError, match="xpos"):
        model.eval()(tokens())


def test_masks_run_as_before() -> None:
    model, reference = TimmBlock(DIM, HEADS), TimmBlock(DIM, HEADS)
    reference.load_state_dict(model.state_dict())
    accelerate(model)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    assert relative_error(model(tokens(), attn_mask=mask), reference(tokens(), attn_mask=mask)) <= FORWARD_BUDGET
    assert relative_error(model(tokens(), mask), reference(tokens())) > 1e-3


def test_what_does_not_fit_is_kept_and_named() -> None:
    @stands_in_for("timm.layers.mlp")
    class GluMlp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.silu(x)

    @stands_in_for("timm.layers.attention")
    class Attention(nn.Module):
        def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            return x

    model: Any = transformer()
    first, second = model.blocks
    first.norm1, first.attn, first.mlp = nn.RMSNorm(DIM), Attention(), GluMlp()
    second.mlp.act = nn.GELU(approximate="tanh")
    second.attn.scale = 1.0
    second.ls1 = nn.Linear(DIM, DIM)
    model.norm._fast_norm = True
    before = model(tokens())
    report = accelerate(model)
    assert report.swapped == [] and kept(report) == {
        "norm": "it normalises in 16 bits (timm's fast norm), ours in float32",
        "blocks.0": "norm1 is RMSNorm, not LayerNorm",
        "blocks.0.attn": "it has no qkv, proj, proj_drop, num_heads, attn_drop, scale",
        "blocks.0.mlp": "there is no kernel for gated MLPs; its layers run as they are",
        "blocks.1": "ls1 is Linear, not LayerScale with one gamma a channel",
        "blocks.1.attn": "scale is 1, not head_dim ** -0.5",
        "blocks.1.mlp": "the activation is GELU(approximate='tanh'), not GELU()",
    }
    assert torch.equal(model(tokens()), before)
    assert "as before: norm1 is RMSNorm" in str(report)


def test_other_versions_and_replaced_methods_are_kept() -> None:
    class Later(TimmBlock):
        """As it might be one day."""

        def forward(self, x: Tensor, attn_mask: Tensor | None = None, window: int = 0) -> Tensor:  # type: ignore[override]
            return super().forward(x, attn_mask)

    stands_in_for("timm.models.vision_transformer", "Block")(Later)
    assert kept(accelerate(Later(DIM, HEADS)))[""] == "its forward takes window, which is not known here"
    mine = TimmBlock(DIM, HEADS)
    mine.forward = lambda x: x  # type: ignore[method-assign,assignment]
    assert kept(accelerate(mine))[""] == "its forward was replaced on the instance"

    class Subclass(TimmBlock):
        def forward(self, *args: Any) -> Tensor:
            return args[0]

    assert "" not in {line.path for line in accelerate(Subclass(DIM, HEADS)).swapped}
    odd = accelerate(TimmBlock(36, 2))
    assert "head_dim 18 is not one of" in kept(odd)["attn"]


def test_vggts_head_keeps_all_but_its_norm() -> None:
    model = nn.ModuleDict({"aggregator": VggtAggregator(1, DIM, HEADS), "point_head": VggtHead(DIM)})
    report = accelerate(model)
    assert [type(line) for line in report.kept] == [Kept] and report.kept[0].path == "point_head"
    assert Swapped("point_head.norm", "torch.nn.modules.normalization.LayerNorm", "layer_norm") in report.swapped
    assert {line.path for line in report.swapped} >= {f"aggregator.{k}_blocks.0.attn" for k in ("frame", "global")}


def test_a_class_made_of_ours_is_not_undone_by_halves() -> None:
    model = transformer()
    accelerate(model)
    block: Any = model.get_submodule("blocks.1")
    block.__class__ = type("Sharded", (type(block),), {})
    with pytest.raises(RuntimeError, match=r"got blocks.1 with the class Sharded"):
        deaccelerate(model)
    block.__class__ = type(block).__bases__[0]
    assert len(deaccelerate(model)) == 7


def test_compiled_in_one_graph() -> None:
    model, reference = transformer(), transformer()
    accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for x in (tokens(), tokens(3)):
        ours, theirs = compiled(x), reference(x)
        assert relative_error(ours, theirs) <= FORWARD_BUDGET
        ours.square().sum().backward()
        theirs.square().sum().backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        if p.ndim == 2 and p.grad is not None and q.grad is not None:
            assert relative_error(p.grad, q.grad) <= 10 * FORWARD_BUDGET


@pytest.mark.parametrize(
    "name", parameters("uniception transformer, recomputed", "uniception dense head", "uniception pose head", "vggt")
)
def test_families_compiled_in_one_graph(name: str) -> None:
    found = pair(name, train=True)
    compiled = torch.compile(found.ours, backend="aot_eager", fullgraph=True)
    mine, other = found.x.clone().requires_grad_(), found.x.clone().requires_grad_()
    for model, x in ((compiled, mine), (found.theirs, other)):
        torch.stack([out.square().mean() for out in found.family.call(model, x, found.size)]).sum().backward()
    assert mine.grad is not None and other.grad is not None
    assert relative_error(mine.grad, other.grad) <= 10 * FORWARD_BUDGET


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_from_outside(reentrant: bool) -> None:
    model, reference = transformer(drop=0.2), transformer(drop=0.2)
    accelerate(model)
    found = []
    for module in (model, reference):
        torch.manual_seed(0)
        x = tokens().requires_grad_()
        checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
        found.append(x.grad)
    assert relative_error(*found) <= 10 * FORWARD_BUDGET


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """In a process of its own, which ends without tidying up: Gloo's group may wait for the interpreter's lock then."""
    code = f"from tests.integrations.test_accelerate import train_in_parallel; train_in_parallel({str(tmp_path)!r})"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=root, env=environment)


def train_in_parallel(folder: str) -> None:
    reference, model = transformer(), transformer()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    parallel = nn.parallel.DistributedDataParallel(model)
    assert len(accelerate(parallel).swapped) == 7
    parallel(tokens()).square().sum().backward()
    reference(tokens()).square().sum().backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        if p.ndim == 2:
            assert relative_error(p.grad, q.grad) <= 10 * FORWARD_BUDGET
    os._exit(0)


def test_inputs_of_other_ranks_run_as_before() -> None:
    model, reference = transformer(), transformer()
    accelerate(model)
    for module in (model.get_submodule("blocks.0.mlp"), model.norm):
        path = "norm" if module is model.norm else "blocks.0.mlp"
        x = tokens()[0]
        assert relative_error(module(x), reference.get_submodule(path)(x)) <= FORWARD_BUDGET
    with torch.no_grad():
        assert model(tokens(0)).shape == (0, 5, DIM)


@needs_oracles
def test_dense_heads_that_do_not_fit() -> None:
    dpt = upstream("prediction_heads.dpt")
    widths = {"input_feature_dims": [32] * 4, "layer_dims": [16] * 4, "feature_dim": 16}
    features = dpt.DPTFeature(patch_size=14, hooks=[0, 1, 2, 3], output_width_ratio=2, **widths)
    model = nn.ModuleList([features, dpt.DPTRegressionProcessor(16, 4, nonlinearity="tanh")])
    found = kept(accelerate(model))
    assert found["1"] == "conv2 is not convolution, ReLU, convolution"
    assert found["0.scratch.refinenet1"] == "it resizes by another ratio (width_ratio 2)"


@needs_oracles
def test_odd_grids_of_a_dense_head() -> None:
    found = pair("uniception dense head", type(TINY)(grid=(3, 5)))
    found.check_float32()


@pytest.mark.parametrize(
    ("rows", "cuda", "capturing", "bound"),
    [(100, True, False, True), (16_384, True, False, False), (100, False, False, False), (100, True, True, False)],
)
def test_few_tokens_on_a_gpu_are_left_to_the_module(
    rows: int, cuda: bool, capturing: bool, bound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert checks.launch_bound(torch.empty(2, rows // 2, 8)) is bound
