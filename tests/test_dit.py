"""DiT: the paper's sizes, its start as the identity, and positions on grids that are not square."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import check_config
from models.dit import Attention, DiT, DiTBlock
from models.layers import patch_grid, sincos_positions, unpatchify
from utils.config import Config
from utils.images import ImageSpec

# Peebles and Xie 2023, Table 4: millions of parameters on 32x32x4 latents of ImageNet.
PUBLISHED = {
    **{"DiT-S/8": 33, "DiT-S/4": 33, "DiT-S/2": 33, "DiT-B/8": 131, "DiT-B/4": 130, "DiT-B/2": 130},
    **{"DiT-L/8": 459, "DiT-L/4": 458, "DiT-L/2": 458},
    **{"DiT-XL/8": 676, "DiT-XL/4": 675, "DiT-XL/2": 675},
}


@pytest.mark.parametrize(("size", "millions"), PUBLISHED.items())
def test_sizes_of_the_paper(size, millions):
    with torch.device("meta"):
        model = DiT(img_size=(32, 32), in_channels=4, out_channels=8, num_classes=1000, size=size)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_a_fresh_block_is_the_identity():
    model = DiT(img_size=(8, 8), in_channels=1, hidden_size=32, depth=1, num_heads=4)
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert torch.equal(model.blocks[0](x, c), x)


def test_attention_can_use_fused_kernels():
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        assert Attention(32, 4)(torch.randn(2, 16, 32)).shape == (2, 16, 32)


def test_attention_is_softmax_of_products():
    attention, x = Attention(32, 4).double(), torch.randn(2, 9, 32).double()
    q, k, v = attention.qkv(x).view(2, 9, 3, 4, 8).unbind(2)
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).div(8**0.5).softmax(-1)
    expected = attention.proj(torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(2, 9, 32))
    torch.testing.assert_close(attention(x), expected)


def test_attention_does_not_know_the_order():
    block = DiTBlock(32, 4, 2.0, 0.0)
    x, c, order = torch.randn(1, 9, 32), torch.randn(1, 32), torch.randperm(9)
    torch.testing.assert_close(block(x, c)[:, order], block(x[:, order], c))


def test_a_block_is_its_formula():
    """Peebles and Xie 2023, figure 3: both branches normalised, modulated, gated and dropped."""
    block = DiTBlock(32, 4, 2.0, 0.3).double().train()
    x, c = torch.randn(2, 9, 32).double() * 3 + 1, torch.randn(2, 32).double()

    def branch(x, shift, scale, gate, layer):
        normalised = (x - x.mean(2, keepdim=True)) / (x.var(2, False, keepdim=True) + 1e-6).sqrt()
        return x + gate[:, None] * layer(normalised * (1 + scale[:, None]) + shift[:, None])

    def attend(x):
        return F.dropout(block.attention(x), 0.3)

    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c).chunk(6, dim=1)
    torch.manual_seed(0)
    expected = branch(x, shift1, scale1, gate1, attend)
    expected = branch(expected, shift2, scale2, gate2, block.mlp)
    torch.manual_seed(0)
    torch.testing.assert_close(block(x, c), expected)


def test_the_network_knows_where_a_patch_stands():
    """Without positions, swapping two patches of the image would just swap the output's."""
    torch.manual_seed(0)
    model = DiT(img_size=(4, 8), in_channels=1, patch_size=4, hidden_size=32, depth=1, num_heads=4)
    for parameter in model.parameters():  # the layers that start at zero would hide it
        torch.nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(1, 1, 4, 8), torch.tensor([5])
    swapped = model(x.roll(4, dims=3), t).roll(4, dims=3)
    assert (swapped - model(x, t)).abs().max() > 0.01


@pytest.mark.parametrize("grid", [(4, 4), (3, 6), (1, 5)])
def test_positions(grid):
    table = sincos_positions(grid, 16).unflatten(0, grid)
    assert table.shape == (*grid, 16)
    assert torch.equal(table[:, :, :8], table[:, :1, :8].expand(-1, grid[1], -1))  # the row's half
    assert torch.equal(table[:, :, 8:], table[:1, :, 8:].expand(grid[0], -1, -1))
    assert torch.pdist(table.flatten(0, 1)).min() > 1e-3


def test_unpatchify_undoes_the_patch_convolution():
    image, patch = torch.randn(2, 3, 6, 9), 3
    grid = patch_grid((6, 9), patch)
    columns = F.unfold(image, patch, stride=patch)  # (B, C p p, N)
    patches = columns.unflatten(1, (3, patch * patch)).permute(0, 3, 2, 1).flatten(2)
    assert torch.equal(unpatchify(patches, grid, patch), image)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (dict(num_heads=5), "num_heads=5 does not divide hidden_size=32"),
        (dict(hidden_size=30, num_heads=3), "multiple of 4"),
        (dict(patch_size=3), "does not divide the image size"),
        (dict(size="DiT-S/2"), "already sets hidden_size, depth, num_heads"),
        (dict(size="DiT-M/2"), "model_params.size='DiT-M/2'"),
        (dict(mlp_ratio=0), "model_params.mlp_ratio=0"),
        (dict(patch=2), "did you mean 'patch_size'"),
    ],
)
def test_bad_parameters_are_one_clear_problem(params, message):
    config = Config(
        experiment_name="test",
        model_type="dit",
        model_params={"hidden_size": 32, "depth": 1, "num_heads": 4, **params},
    )
    problems = list(check_config(config, ImageSpec(1, 8, 8, 10)))
    assert len(problems) == 1
    assert message in problems[0].message
