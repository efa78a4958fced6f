"""DiM: the orders in which it walks, what it pads, and how it starts."""

import pytest
import torch

from models import build_model, check_config
from models.dim import SIZES, DiM
from models.scan_paths import mirrored, moves, scan_paths
from training.optim import build_optimizer
from utils.config import Config
from utils.images import ImageSpec

SCANS = {"cross4": 4, "row": 1, "row_bidir": 2, "zigzag8": 8}
GRIDS = [(4, 4), (3, 5), (6, 2), (1, 4)]


def make(**params):
    torch.manual_seed(0)
    arguments = dict(img_size=(8, 8), in_channels=1, num_classes=10, hidden_size=32, depth=5)
    return DiM(**{**arguments, **params})


def inputs(batch=2, side=(8, 8)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 1, *side, generator=generator)
    return x, torch.arange(batch) * 100, torch.arange(batch) % 10


# --- paths


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scan", SCANS)
class TestPaths:
    def test_every_path_visits_every_cell_once(self, scan, grid):
        paths = scan_paths(scan, grid)
        assert len(paths) == SCANS[scan]
        for path in paths:
            assert torch.equal(path.sort().values, torch.arange(grid[0] * grid[1]))

    @pytest.mark.parametrize("depth", [1, 2, 5, 12, 13])
    def test_moves_lead_through_all_orders_and_back(self, scan, grid, depth):
        cycle = scan_paths(scan, grid)
        paths = [cycle[i] for i in mirrored(depth, len(cycle))]
        cells = torch.arange(grid[0] * grid[1])
        tokens = cells
        for path, move in zip(paths, moves(paths), strict=False):
            tokens = tokens[move]
            assert torch.equal(tokens, path)
        assert torch.equal(tokens[moves(paths)[-1]], cells)


def test_paths_of_a_small_grid():
    """0 1 2
    3 4 5"""
    rows, back, columns, up = (path.tolist() for path in scan_paths("cross4", (2, 3)))
    assert rows == [0, 1, 2, 3, 4, 5]
    assert back == rows[::-1]
    assert columns == [0, 3, 1, 4, 2, 5]
    assert up == columns[::-1]
    assert scan_paths("zigzag8", (2, 3))[0].tolist() == [0, 1, 2, 5, 4, 3]


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_snakes_step_to_neighbours_and_start_in_the_corners(grid):
    paths = scan_paths("zigzag8", grid)
    for path in paths:
        rows, columns = path // grid[1], path % grid[1]
        assert (rows.diff().abs() + columns.diff().abs() == 1).all()
    assert len({tuple(path.tolist()) for path in paths}) == 8
    corners = [0, grid[1] - 1, (grid[0] - 1) * grid[1], grid[0] * grid[1] - 1]
    assert sorted(int(path[0]) for path in paths) == sorted(corners * 2)


def test_the_paper_s_order_of_13_blocks():
    assert mirrored(13, 4) == [0, 1, 2, 3, 0, 1, 2, 1, 0, 3, 2, 1, 0]


@pytest.mark.parametrize("depth", range(1, 15))
@pytest.mark.parametrize("scan", SCANS)
def test_skips_meet_in_the_order_they_left(scan, depth):
    """Run the network on tokens that are their own names: a skip and the stream it joins must
    name the same patch at every place."""
    model = make(depth=depth, scan=scan, img_size=(8, 12))
    pairs = []

    class Spy(torch.nn.Module):
        def __init__(self, joins):
            super().__init__()
            self.joins = joins

        def forward(self, x, c, skip=None):
            assert (skip is not None) == self.joins
            if skip is not None:
                pairs.append((x, skip))
            return x

    model.blocks = torch.nn.ModuleList(Spy(block.skip is not None) for block in model.blocks)
    length = model.permutations.shape[1]
    model._tokens = lambda *_: torch.arange(length).float()[None, :, None].expand(1, length, 32)
    model(*inputs(1, (8, 12)))
    assert len(pairs) == (depth - 1) // 2
    assert all(torch.equal(x, skip) for x, skip in pairs)


# --- tokens


def test_length_of_the_padded_sequence():
    """The paper's 16 x 16 grid: 361 tokens with 3 pads, and 2 conditions and 3 separators."""
    with torch.device("meta"):
        lengths = [
            make(img_size=(32, 32), pad_tokens=pads).permutations.shape[1] for pads in (3, 2, 1, 0)
        ]
    assert lengths == [361 + 5, 324 + 4, 289 + 3, 256 + 2]


def test_padding_tokens_that_nobody_asked_for():
    """The paper's three where they part rows or columns; a scan of one direction needs none."""
    expected = {"cross4": 3, "row": 0, "row_bidir": 3, "zigzag8": 0}
    num_conditions = 2
    with torch.device("meta"):
        assert {scan: make(scan=scan).num_prefix - num_conditions for scan in SCANS} == expected


def test_pads_stand_after_every_row_and_column_and_leave_again():
    model = make(img_size=(4, 6), pad_tokens=2).double()
    h, w, p = 2, 3, 2
    with torch.no_grad():
        model.pads.copy_(torch.tensor([-1.0, -2.0])[:, None].expand(2, 32))
    tokens = model._tokens(torch.randn(1, 1, 4, 6).double(), torch.zeros(1, 2, 32).double())
    assert torch.equal(tokens[0, 2:4, 0], torch.tensor([-1.0, -2.0]).double())  # separators
    grid = tokens[0, 2 + p :, 0].view(h + p, w + p)
    assert torch.equal(grid[:h, w:], torch.tensor([-1.0, -2.0]).expand(h, p).double())
    assert torch.equal(grid[h:, :w], torch.tensor([[-1.0], [-2.0]]).expand(p, w).double())

    # what stands in the pads' places at the end reaches no pixel
    restored = []
    handle = model.last_conv.register_forward_pre_hook(lambda _, args: restored.append(args[0]))
    model.blocks = torch.nn.ModuleList()
    model.permutations, model.moves_tokens = model.permutations[:1], (False,)
    model.num_skips = 0
    model(torch.randn(1, 1, 4, 6).double(), torch.tensor([1]), torch.tensor([1]))
    handle.remove()
    assert restored[0].shape == (1, 32, h, w)
    assert not torch.isin(restored[0], model.pads).any()


def test_reach_of_the_scans():
    """The blocks alone, without convolutions: after a cycle of four directions every token
    depends on every other; by rows alone on earlier ones only."""

    def dependence(scan, depth):
        model = make(img_size=(6, 8), depth=depth, scan=scan, pad_tokens=0, patch_size=2)
        length = 12
        tokens = torch.randn(1, length + 2, 32, requires_grad=True)
        x = tokens
        for i, block in enumerate(model.blocks):
            x = model._move(x, i)
            skip = torch.zeros_like(x) if block.skip is not None else None
            x = block(x, torch.zeros(1, 96), skip)
        x = model._move(x, depth)[0, 2:]
        reach = torch.zeros(length, length, dtype=torch.bool)
        for i in range(length):
            (grad,) = torch.autograd.grad(x[i].sum(), tokens, retain_graph=True)
            reach[i] = grad[0, 2:].abs().sum(1) > 0
        return reach

    assert dependence("cross4", 7).all()
    assert torch.equal(dependence("row", 2), torch.ones(12, 12).tril().bool())


@pytest.mark.parametrize("scan", SCANS)
def test_without_blocks_a_pixel_depends_on_its_neighbours_alone(scan):
    """What every order of tokens ends in is the image's own: only the two 3x3 convolutions around
    the blocks mix patches, so an output depends on patches at most two away, and on all of them."""

    class NoBlock(torch.nn.Module):
        def forward(self, x, c, skip=None):
            return x

    model = make(img_size=(12, 14), depth=3, scan=scan, num_classes=0)
    model.blocks = torch.nn.ModuleList(NoBlock() for _ in model.blocks)
    torch.nn.init.normal_(model.out.weight)
    x = torch.randn(1, 1, 12, 14, requires_grad=True)
    output = model(x, torch.tensor([3]))
    rows, columns = torch.arange(6)[:, None], torch.arange(7)
    for row, column in ((0, 0), (1, 5), (3, 2), (5, 6)):
        (grad,) = torch.autograd.grad(output[0, 0, 2 * row, 2 * column], x, retain_graph=True)
        reached = torch.nn.functional.max_pool2d(grad[0].abs(), 2)[0] > 0  # (6, 7) patches
        near = ((rows - row).abs() <= 2) & ((columns - column).abs() <= 2)
        assert torch.equal(reached, near)


# --- sizes, start, options


@pytest.mark.parametrize(
    ("size", "millions"), [("DiM-S/2", 49.9), ("DiM-L/2", 381.5), ("DiM-H/2", 854.0)]
)
def test_sizes_of_the_paper(size, millions):
    """Counted without what depends on image and classes."""
    with torch.device("meta"):
        model = DiM(img_size=(32, 32), in_channels=4, num_classes=1000, size=size)
    tables = ("patch_embedding", "label_embedding", "positions", "out.")
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(tables))
    assert count / 1e6 == pytest.approx(millions, rel=0.005)


def test_all_named_sizes_build():
    for size in SIZES:
        with torch.device("meta"):
            DiM(img_size=(8, 8), in_channels=1, size=size)


def test_initialisation_leaves_the_mixers_alone():
    depth = 9
    model = make(depth=depth, hidden_size=64)
    for block in model.blocks:
        steps = torch.nn.functional.softplus(block.mixer.dt_proj.bias)
        assert 0.99e-3 < steps.min() < steps.max() < 1.01e-1
        expected = torch.arange(1.0, 17).log().expand(128, 16)
        torch.testing.assert_close(block.mixer.A_log.detach(), expected)
        limit = 1 / 64**0.5  # a linear layer's own: uniform within 1 / sqrt(inputs)
        assert 0.9 * limit < block.mixer.in_proj.weight.abs().max() <= limit
        limit = 1 / 128**0.5 / depth**0.5
        assert 0.9 * limit < block.mixer.out_proj.weight.abs().max() <= limit


def test_gates_start_open_and_decay_does_not_close_them():
    """adaln_single: the gate is 1 + what is learned, so zero tables leave it at 1."""
    for conditioning, offset in (("adaln_single", 1.0), ("adaln_zero", 0.0)):
        block = make(conditioning=conditioning, depth=1).blocks[0]
        for parameter in (block.table, *(block.modulation or torch.nn.Module()).parameters()):
            if parameter is not None:
                torch.nn.init.zeros_(parameter)
        x = torch.randn(1, 5, 32)
        c = torch.zeros(1, 96 if offset else 32)
        expected = x + offset * block.mixer(block.norm1(x))
        torch.testing.assert_close(block(x, c), expected)


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_decays_step_sizes_and_pads_are_spared_from_weight_decay(mixer):
    model = make(mixer=mixer, depth=2)
    spared = {name.rpartition("mixer.")[2] for name in model.no_weight_decay()}
    own = {"dt_proj.bias"} if mixer == "mamba1" else {"dt_bias"}
    assert spared == {"A_log", "D", "pads", *own}
    config = Config(experiment_name="test", weight_decay=0.1, learning_rate=0.1)
    optimizer = build_optimizer(model, config)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(model.parameters())
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if name in model.no_weight_decay() else 1 - 0.1 * 0.1
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_every_option_learns():
    """A few steps on eight images: the loss falls to a fraction."""
    for params in (
        dict(),
        dict(mixer="mamba2"),
        dict(scan="row", mlp_ratio=2.0),
        dict(scan="row_bidir", conditioning="adaln_zero", mlp_ratio=2.0, dropout=0.1),
        dict(scan="zigzag8", depth=4),
    ):
        model = make(**{"depth": 3, **params})
        x, t, y = inputs(8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        losses = []
        for _ in range(40):
            loss = (model(x, t, y) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert losses[-1] < 0.3 * losses[0], params


def test_labels_and_time_stand_in_front():
    assert make().positions.shape[0] == 2 + 16
    assert make(num_classes=0).positions.shape[0] == 1 + 16


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (dict(dropout=0.1), "mlp_ratio=0 has none"),
        (dict(dropout=0.1, mlp_ratio=0.02), "less than one"),
        (dict(scan="zigzag8", pad_tokens=2), "use pad_tokens=0"),
        (dict(pad_tokens=4), "model_params.pad_tokens=4"),
        (dict(size="DiM-B/2", hidden_size=None, depth=None), "model_params.size='DiM-B/2'"),
        (dict(size="DiM-S/2"), "already sets hidden_size, depth"),
        (dict(mixer="mamba2", hidden_size=48), "divisible by 64"),
        (dict(scan="diagonal"), "model_params.scan='diagonal'"),
        (dict(mamba_backend="cuda"), "model_params.mamba_backend='cuda'"),
        (dict(patch_size=3), "does not divide the image size"),
    ],
)
def test_bad_parameters_are_one_clear_problem(params, message):
    given = {"hidden_size": 32, "depth": 3, **params}
    config = Config(
        experiment_name="test",
        model_type="dim",
        model_params={k: v for k, v in given.items() if v is not None},
    )
    problems = list(check_config(config, ImageSpec(1, 8, 8, 10)))
    assert len(problems) == 1
    assert message in problems[0].message


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_the_residual_stream_stays_in_fp32(mixer, recwarn):
    model = make(mixer=mixer)
    streams = []
    for block in model.blocks:
        for norm in (block.norm1, model.final_norm):
            norm.register_forward_pre_hook(lambda _, args: streams.append(args[0].dtype))
        block.register_forward_hook(lambda _, args, output: streams.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*inputs())
    assert set(streams) == {torch.float32}
    assert not [warning for warning in recwarn if "ismatch" in str(warning.message)]


def test_fp16_is_warned_about(caplog):
    for precision, warned in (("bf16", False), ("fp16", True)):
        config = Config(
            experiment_name="test",
            model_type="dim",
            model_params=dict(hidden_size=32, depth=1),
            precision=precision,
        )
        caplog.clear()
        build_model(config, ImageSpec(1, 8, 8, 10))
        assert any("NaN in fp16" in message for message in caplog.messages) == warned
