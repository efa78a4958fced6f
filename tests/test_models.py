"""The contract of every backbone, and what is particular to the UNet."""

import copy

import pytest
import torch
import torch.nn.functional as F

from models import BACKBONES, build_model, check_config, compile_model
from models.layers import MLP, LabelEmbedding, gelu, timestep_features
from models.unet import AttentionBlock, Upsample
from training.ema import EMA
from utils.config import Config
from utils.errors import ConfigError
from utils.images import ImageSpec

SMALL = {
    "unet": dict(model_channels=16, channel_mult=(1, 2), num_res_blocks=1, dropout=0.0),
    "dit": dict(hidden_size=32, depth=2, num_heads=4),
    "jit": dict(patch_size=2, hidden_size=32, depth=2, num_heads=4, class_tokens_at=1),
    "dim": dict(hidden_size=32, depth=3),
}
SPECS = [ImageSpec(1, 8, 8, 10), ImageSpec(3, 16, 8, 4)]


def make(model_type="unet", spec=SPECS[0], conditional=True, **params):
    config = Config(
        experiment_name="test",
        model_type=model_type,
        conditional=conditional,
        model_params={**SMALL[model_type], **params},
    )
    return build_model(config, spec)


def randomised(model):
    """Zero-initialised layers would hide what the network depends on."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def inputs(spec, batch=3):
    x = torch.randn(batch, *spec.shape, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(batch) * 7, torch.arange(batch) % spec.num_classes


@pytest.mark.parametrize("model_type", BACKBONES)
@pytest.mark.parametrize("spec", SPECS)
class TestContract:
    def test_shape_and_zero_start(self, model_type, spec):
        x, t, y = inputs(spec)
        output = make(model_type, spec)(x, t, y)
        assert output.shape == x.shape
        assert (output == 0).all()

    def test_depends_on_every_input(self, model_type, spec):
        model = randomised(make(model_type, spec))
        x, t, y = inputs(spec)
        base = model(x, t, y)
        for changed in ((x + 0.1, t, y), (x, t + 1, y), (x, t, (y + 1) % 4), (x, t, y * 0 - 1)):
            assert not torch.allclose(model(*changed), base, atol=1e-6)

    def test_null_label_is_unlike_every_label(self, model_type, spec):
        model = randomised(make(model_type, spec))
        x, t, y = (tensor[:1] for tensor in inputs(spec))
        null = model(x, t, y * 0 - 1)
        for label in range(spec.num_classes):
            assert not torch.allclose(model(x, t, y * 0 + label), null, atol=1e-6)

    def test_a_wrong_size_is_a_clear_error(self, model_type, spec):
        model = make(model_type, spec)
        _, t, y = inputs(spec)
        for side in (spec.height + 1, spec.height - 1):
            with pytest.raises(ValueError, match=rf"{side}x{spec.width}"):
                model(torch.zeros(3, spec.channels, side, spec.width), t, y)
        odd = ImageSpec(spec.channels, spec.height + 1, spec.width, spec.num_classes)
        with pytest.raises(ConfigError, match=str(odd.height)):
            make(model_type, odd)

    def test_compiles_without_graph_breaks(self, model_type, spec):
        """Traced forward and backward as torch.compile does it, without its slow code generation;
        the results are those of the plain network. As one for one size of image, by blocks for
        the other, to save time."""
        how = "model" if spec is SPECS[0] else "blocks"
        torch._dynamo.reset()
        model = randomised(make(model_type, spec))
        expected = model(*inputs(spec))
        gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
        parts = [model] if how == "model" else list(blocks_of(model))
        assert parts
        for part in parts:
            part.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        found = model(*inputs(spec))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        again = torch.autograd.grad(found.square().sum(), list(model.parameters()))
        for ours, theirs in zip(again, gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm()

    def test_rows_do_not_mix(self, model_type, spec):
        model = randomised(make(model_type, spec))
        x, t, y = inputs(spec)
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(model(x, t, y), alone, rtol=1e-4, atol=1e-4)

    def test_every_parameter_learns(self, model_type, spec):
        model = randomised(make(model_type, spec)).train()
        model(*inputs(spec)).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())

    def test_unconditional_takes_no_labels(self, model_type, spec):
        x, t, _ = inputs(spec)
        model = make(model_type, spec, conditional=False)
        assert model(x, t, None).shape == x.shape
        assert not any(isinstance(m, LabelEmbedding) for m in model.modules())


def blocks_of(model):
    """What compile_model(model, "blocks") compiles."""
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
        compile_model(model, "blocks")
    return compiled


# Options with dropout, and how many layers of it they make.
DROPOUT = {
    "unet": (dict(dropout=0.5), 2 + 2 + 4),  # one a residual block: down, bottleneck, up
    "dit": (dict(dropout=0.5), 2 * 2),  # after attention and within the MLP, two blocks
    "jit": (dict(dropout=0.5), 2 * 2),
    "dim": (dict(dropout=0.5, mlp_ratio=2.0), 3),
}


@pytest.mark.parametrize("model_type", DROPOUT)
def test_every_dropout_acts_in_training_alone(model_type):
    params, count = DROPOUT[model_type]
    model = randomised(make(model_type, **params))
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert [layer.p for layer in layers] == [0.5] * count
    for acting in layers:
        for layer in layers:
            layer.p = 0.5 if layer is acting else 0.0
        with torch.no_grad():
            dropped = [model.train()(*inputs(SPECS[0])) for _ in range(2)]
            whole = [model.eval()(*inputs(SPECS[0])) for _ in range(2)]
        assert torch.equal(*whole)
        assert not torch.allclose(*dropped, atol=1e-6)


def test_mlp_is_its_formula_with_dropout_after_both_layers():
    mlp, x = MLP(8, 16, 0.4).double().train(), torch.randn(5, 8).double()
    torch.manual_seed(0)
    hidden = F.dropout(F.gelu(mlp.fc1(x), approximate="tanh"), 0.4)
    expected = F.dropout(mlp.fc2(hidden), 0.4)
    torch.manual_seed(0)
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("model_type", BACKBONES)
def test_activation_checkpointing_keeps_less_and_changes_nothing(model_type):
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        params = dict(DROPOUT[model_type][0], activation_checkpointing=recompute)
        model = randomised(make(model_type, **params)).train()
        kept = {}

        def count(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = model(*inputs(SPECS[0]))
        output.square().sum().backward()
        results.append((sum(kept.values()), [p.grad for p in model.parameters()]))
    (all_bytes, expected), (fewer_bytes, found) = results
    assert fewer_bytes < 0.5 * all_bytes
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_compiled_backward_keeps_the_recurrence_out_of_autocast():
    """torch.compile would run the backward of Mamba-2's products in bf16, against our word."""
    torch._dynamo.reset()
    model = randomised(make("dim", mixer="mamba2", depth=1))

    def gradients():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(*inputs(SPECS[0])).square().sum()
        return torch.autograd.grad(loss, list(model.parameters()))

    expected = gradients()
    with torch._functorch.config.patch(backward_pass_autocast="same_as_forward"):
        compile_model(torch.nn.Identity(), "model")
        model.compile(backend="aot_eager", fullgraph=True)
        found = gradients()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_compiled_gelu_is_the_same_function():
    torch._dynamo.reset()
    traced = []

    def keep_graph(graph, _inputs):
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(gelu, backend=keep_graph, fullgraph=True)
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-5)):
        x = torch.linspace(-200, 200, 4001, dtype=dtype).requires_grad_()
        expected, found = F.gelu(x, approximate="tanh"), compiled(x)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        grads = [torch.autograd.grad(y.sum(), x)[0] for y in (expected, found)]
        torch.testing.assert_close(grads[1], grads[0], rtol=tolerance, atol=tolerance)
        assert torch.equal(gelu(x), expected)
    assert any("sigmoid" in name for name in traced)


def test_compile_model_does_what_it_says():
    model = make("dit")
    compile_model(model, None)
    assert model._compiled_call_impl is None
    compile_model(model, "blocks")
    assert model._compiled_call_impl is None
    assert all(block._compiled_call_impl is not None for block in model.blocks)
    compile_model(model, "model")
    assert model._compiled_call_impl is not None


def test_label_embedding_row_zero_is_the_null_label():
    embedding = LabelEmbedding(3, 4)
    rows = embedding(torch.tensor([-1, 0, 2]))
    assert torch.equal(rows, embedding.table.weight[[0, 1, 3]])
    with pytest.raises(IndexError):
        embedding(torch.tensor([3]))


def test_timestep_features_differ_and_are_bounded():
    features = timestep_features(torch.arange(1000), 32)
    assert features.shape == (1000, 32)
    assert features.abs().max() <= 1
    assert torch.pdist(features).min() > 1e-3


def test_concat_conditioning_adds_input_planes():
    model = make(class_conditioning="concat", class_emb_size=5)
    assert model.stem.in_channels == 1 + 5
    assert model.label_embedding is None
    randomised(model)
    x, t, y = inputs(SPECS[0])
    assert not torch.allclose(model(x, t, y), model(x, t, (y + 1) % 10))


def test_attention_is_where_it_was_asked_for():
    def count(**params):
        model = make(spec=ImageSpec(1, 16, 16, 10), channel_mult=(1, 1, 1), **params)
        return sum(type(m).__name__ == "AttentionBlock" for m in model.modules())

    assert count(use_attention=False) == 0
    assert count(attention_resolutions=()) == 1  # the bottleneck
    assert count(attention_resolutions=(8,)) == 1 + 1 + 2
    assert count() == 1 + 3 + 6


@pytest.mark.parametrize("shape", [(16, 64), (64, 16)])
def test_a_level_is_known_by_its_shorter_side(shape):
    def count(**params):
        model = make(spec=ImageSpec(1, *shape, 10), channel_mult=(1, 1, 1), **params)
        return sum(isinstance(m, AttentionBlock) for m in model.modules())

    assert count(attention_resolutions=(4,)) == 1 + 1 + 2
    assert count() == 1 + 3 + 6
    with pytest.raises(ConfigError, match=r"\[64\] match no level; .* the sides 16, 8, 4"):
        count(attention_resolutions=(64,))


def test_norm_groups_is_the_number_of_groups_of_every_norm():
    model = make(norm_groups=4)
    assert {m.num_groups for m in model.modules() if isinstance(m, torch.nn.GroupNorm)} == {4}
    with pytest.raises(ConfigError, match="norm_groups=5 does not divide a level's 16 channels"):
        make(norm_groups=5)


def test_attention_can_use_fused_kernels():
    """Fused kernels refuse strided channels without a word and leave a quadratic matrix."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    block = AttentionBlock(16, num_head_channels=8)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        assert block(torch.randn(2, 16, 4, 4)).shape == (2, 16, 4, 4)


def test_channels_last_is_a_layout_and_nothing_else():
    spec, x, t, y = SPECS[1], torch.randn(2, 3, 16, 8), torch.tensor([3, 7]), torch.tensor([0, 1])
    plain = randomised(make(spec=spec))
    config = Config(
        conditional=True, model_type="unet", model_params=SMALL["unet"], channels_last=True
    )
    model = build_model(config, spec).eval()
    model.load_state_dict(plain.state_dict())
    kernels = [p for p in model.parameters() if p.ndim == 4 and p.shape[2:] == (3, 3)]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    torch.testing.assert_close(model(x, t, y), plain(x, t, y))


@pytest.mark.parametrize("size", [(4, 4), (1, 3)])
def test_upsampling_is_repetition_and_a_convolution(size):
    """The short cut, its gradients too, against the two steps that it stands for."""
    up = Upsample(6).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    plain = up.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(up(x), plain)
    weights = torch.randn_like(plain)
    inputs = (x, up.conv.weight, up.conv.bias)
    wanted = torch.autograd.grad((plain * weights).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((up(x) * weights).sum(), inputs), wanted)


def test_cifar10_network_has_the_size_of_the_paper():
    """DDPM's CIFAR-10 network has 35.7 M parameters; the class embedding adds a few thousand."""
    config = Config(
        experiment_name="test",
        conditional=True,
        model_params=dict(
            model_channels=128,
            channel_mult=(1, 2, 2, 2),
            num_res_blocks=2,
            attention_resolutions=(16,),
        ),
    )
    with torch.device("meta"):
        model = build_model(config, ImageSpec(3, 32, 32, 10), torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(35.7e6, rel=0.01)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (dict(model_chanels=32), "did you mean 'model_channels'"),
        (dict(dropout="a lot"), "model_params.dropout"),
        (dict(use_attention=1), "model_params.use_attention"),
        (dict(model_channels=True), "model_params.model_channels"),
        (dict(in_channels=3), "contradicts the data"),
        (dict(channel_mult=(1, 2, 2, 2, 2)), "cannot be halved 4 times"),
        (dict(attention_resolutions=(5,)), "match no level"),
        (dict(class_conditioning="add"), "class_conditioning"),
    ],
)
def test_bad_parameters_are_one_clear_problem(params, message):
    config = Config(
        experiment_name="test", conditional=True, model_params={**SMALL["unet"], **params}
    )
    problems = list(check_config(config, SPECS[0]))
    assert len(problems) == 1
    assert message in problems[0].message


def test_build_refuses_what_does_not_fit():
    with pytest.raises(ConfigError, match="cannot be halved"):
        make(channel_mult=(1, 1, 1, 1, 1))


def test_ema_follows_with_warm_up():
    model = torch.nn.Linear(2, 2)
    ema = EMA(model, decay=0.5)
    expected = copy.deepcopy(model.weight.detach())
    for n in range(20):
        with torch.no_grad():
            model.weight.add_(1.0)
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        torch.testing.assert_close(ema.model.weight, expected)
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_ema_has_the_buffers_of_the_model():
    model = torch.nn.BatchNorm1d(3)
    ema = EMA(model, decay=0.9)
    model(torch.randn(8, 3) * 2 + 1)
    ema.update(model)
    assert (model.running_mean != 0).all()
    assert ema.model.num_batches_tracked == 1
    assert torch.equal(ema.model.running_mean, model.running_mean)
    assert torch.equal(ema.model.running_var, model.running_var)
