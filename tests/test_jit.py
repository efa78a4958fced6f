"""JiT: the paper's sizes, its block as a formula, rotary positions and class tokens."""

import pytest
import torch
import torch.nn.functional as F

from models import check_config
from models.dit import Attention
from models.jit import SIZES, JiT
from models.layers import rotary_table, rotate
from utils.config import Config
from utils.images import ImageSpec

# Li and He 2025: millions of parameters at 256 pixels (patches of 16) and at 512 (patches of 32).
PUBLISHED = {"JiT-B/16": 131, "JiT-B/32": 133, "JiT-L/16": 459, "JiT-L/32": 462}
PUBLISHED |= {"JiT-H/16": 953, "JiT-H/32": 956}
CLASS_TOKENS_AT = {"B": 4, "L": 8, "H": 10}

SMALL = dict(patch_size=2, hidden_size=32, depth=4, num_heads=4, bottleneck=8, num_class_tokens=3)
SPEC = ImageSpec(1, 4, 6, 10)  # 2 x 3 patches


def make(**params):
    sizes = dict(img_size=(4, 6), in_channels=1, num_classes=10)
    return JiT(**{**sizes, **SMALL, **params})


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_the_paper(size):
    side = 256 if size.endswith("/16") else 512
    with torch.device("meta"):
        model = JiT(img_size=(side, side), in_channels=3, num_classes=1000, size=size)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED[size], rel=0.01)
    assert model.class_tokens_at == CLASS_TOKENS_AT[size[4]]


def turned(x, grid):
    """Tokens (..., N, d), as complex numbers turned by row or column times 10000^(-4k/d)."""
    rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    d = x.shape[-1]
    frequencies = 10_000.0 ** (-4 * torch.arange(d // 4, dtype=torch.float64) / d)
    angles = [side.flatten()[:, None] * frequencies for side in (rows, columns)]
    turns = torch.polar(torch.ones((), dtype=torch.float64), torch.cat(angles, 1))
    pairs = torch.complex(*x.double().chunk(2, -1)) * turns
    return torch.cat([pairs.real, pairs.imag], -1)


@pytest.mark.parametrize("grid", [(4, 4), (3, 6), (1, 5)])
def test_rotation_by_row_and_column(grid):
    x = torch.randn(2, 3, grid[0] * grid[1], 16)
    found = rotate(x, rotary_table(grid, 16))
    torch.testing.assert_close(found.double(), turned(x, grid), rtol=1e-5, atol=1e-5)


def test_attention_logits_depend_on_offsets_only(monkeypatch):
    """The logits of a pair of tokens, wherever it lies: its content and its offset decide."""
    attention, (h, w), seen = Attention(32, 2, qk_norm=True), (5, 6), []

    def keep(q, k, v):
        seen.append((q @ k.transpose(-1, -2)).detach())
        return v

    monkeypatch.setattr("models.dit.F.scaled_dot_product_attention", keep)
    image, rotations = torch.randn(1, h - 1, w - 2, 32), rotary_table((h, w), 16)
    for top, left in ((0, 0), (1, 2), (0, 1)):
        padded = F.pad(image, (0, 0, left, 2 - left, top, 1 - top))
        attention(padded.flatten(1, 2), rotations)
        logits = seen.pop().unflatten(3, (h, w)).unflatten(2, (h, w))
        rows, columns = slice(top, top + h - 1), slice(left, left + w - 2)
        seen.insert(0, logits[:, :, rows, columns, rows, columns])
    for shifted in seen[1:]:
        torch.testing.assert_close(shifted, seen[0], rtol=0, atol=1e-5)
    # the same two tokens at another offset attend to each other otherwise
    attention(torch.ones(1, h * w, 32), rotations)
    alike = seen.pop()[0, 0, 0]
    assert torch.pdist(alike[:, None]).min() > 1e-5


def test_class_tokens_do_not_turn():
    model, x = make(), torch.randn(1, 4, 3 + 6, 8)
    found = rotate(x, model.rotations)
    assert torch.equal(found[:, :, :3], x[:, :, :3])
    assert torch.equal(found[:, :, 3:], rotate(x[:, :, 3:], rotary_table((2, 3), 8)))
    assert not torch.allclose(found[:, :, 4:], x[:, :, 4:], atol=1e-3)


def test_a_block_is_its_formula():
    model = make(dropout=0.3).double().train()
    block, (x, c) = model.blocks[1], (torch.randn(2, 6, 32).double(), torch.randn(2, 32).double())
    for parameter in block.parameters():  # norms start at one, the modulation at zero
        torch.nn.init.normal_(parameter, std=0.3)

    def norm(x, module):
        return module.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def attend(x):
        q, k, v = block.attention.qkv(x).view(2, 6, 3, 4, 8).permute(2, 0, 3, 1, 4)
        q = turned(norm(q, block.attention.q_norm), (2, 3))
        k = turned(norm(k, block.attention.k_norm), (2, 3))
        out = (q @ k.mT / 8**0.5).softmax(-1) @ v
        return F.dropout(block.attention.proj(out.transpose(1, 2).flatten(2)), 0.3)

    def gated(x):
        hidden = block.mlp.fc1(x)
        hidden = F.silu(hidden[..., :85]) * hidden[..., 85:]  # 85 = 2/3 of 4 times 32
        return block.mlp.fc2(F.dropout(hidden, 0.3))

    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)[:, None].chunk(6, dim=2)
    torch.manual_seed(0)
    expected = x + gate1 * attend(norm(x, block.norm1) * (1 + scale1) + shift1)
    h = norm(expected, block.norm2) * (1 + scale2) + shift2
    expected = expected + gate2 * gated(h)
    torch.manual_seed(0)
    found = block(x, c, model.rotations[:, 3:])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the table is float32


@pytest.mark.parametrize(("params", "at"), [({}, 1), (dict(class_tokens_at=3), 3)])
def test_class_tokens_join_at_their_block_and_leave_at_the_end(params, at):
    model, entering = make(**params), []
    for block in model.blocks:  # fresh blocks change nothing
        block.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    x, y = torch.randn(2, 1, 4, 6), torch.tensor([-1, 7])
    assert model(x, torch.tensor([3, 5]), y).shape == x.shape
    assert [tokens.shape[1] for tokens in entering] == [6] * at + [9] * (4 - at)
    label = model.label_embedding(y)[:, None]
    assert torch.equal(entering[-1][:, :3], label + model.class_positions)
    assert torch.equal(entering[-1][:, 3:], entering[0])


def test_class_tokens_are_part_of_what_is_drawn():
    model = make()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    inputs = torch.randn(2, 1, 4, 6), torch.tensor([3, 5]), torch.tensor([-1, 7])
    before = model(*inputs)
    with torch.no_grad():
        model.class_positions += 1
    assert not torch.allclose(model(*inputs), before, atol=1e-3)


@pytest.mark.parametrize("depth", [12, 24, 32, 6])
def test_dropout_is_in_the_middle_half_of_the_blocks(depth):
    with torch.device("meta"):
        model = make(depth=depth, dropout=0.2)
    quarter = depth // 4
    expected = [0.0] * quarter + [0.2] * (depth - 2 * quarter) + [0.0] * quarter
    assert [block.dropout.p for block in model.blocks] == expected
    assert [block.mlp.dropout.p for block in model.blocks] == expected


def test_each_part_can_be_left_out():
    whole = set(dict(make().named_parameters()))
    bare = make(num_class_tokens=0, qk_norm=False, rope=False, swiglu=False)
    norms = {f"blocks.{i}.attention.{which}_norm.weight" for i in range(4) for which in "qk"}
    assert whole - set(dict(bare.named_parameters())) == {"class_positions", *norms}
    assert bare.rotations is None
    assert bare.blocks[0].mlp.fc1.out_features == 4 * 32
    unconditional = make(num_classes=0)
    assert unconditional.class_positions is None
    x, t = torch.randn(2, 1, 4, 6), torch.tensor([3, 5])
    assert unconditional(x, t).shape == bare(x, t, t).shape == x.shape


def test_tables_are_not_in_the_checkpoint():
    model = make()
    assert {name for name, _ in model.named_buffers()} == {"positions", "rotations"}
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (dict(num_heads=5), "num_heads=5 does not divide hidden_size=32"),
        (dict(num_heads=16), "rope=True needs heads of a multiple of 4 channels, not 2"),
        (dict(hidden_size=30, num_heads=3), "multiple of 4"),
        (dict(patch_size=4), "patch_size=4 does not divide the image size"),
        (dict(class_tokens_at=4), "class_tokens_at=4: the last block is 3"),
        (dict(class_tokens_at=1, num_class_tokens=0), "num_class_tokens=0 has none"),
        (dict(num_class_tokens=-1), "model_params.num_class_tokens=-1"),
        (dict(mlp_ratio=0.04), "raise mlp_ratio"),
        (dict(size="JiT-B/16"), "sets patch_size, hidden_size, depth, num_heads, bottleneck"),
        (dict(size="JiT-S/16"), "model_params.size='JiT-S/16'"),
        (dict(bottle_neck=8), "did you mean 'bottleneck'"),
    ],
)
def test_bad_parameters_are_one_clear_problem(params, message):
    config = Config(conditional=True, model_type="jit", model_params={**SMALL, **params})
    problems = list(check_config(config, SPEC))
    assert len(problems) == 1
    assert message in problems[0].message
