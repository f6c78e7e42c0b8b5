"""What each direction reads, and in which order."""

import pytest
import torch

from mmvim import VisionMamba
from mmvim.models.directions import DIRECTIONS, column_order
from mmvim.models.mamba_mixer import MambaMixer

GRID = (3, 4)
PLACES = (None, 'head', 'middle', 'double')


def small(directions: str, **args) -> VisionMamba:
    torch.manual_seed(0)
    arch = dict(embed_dims=16, depth=2, d_state=4)
    return VisionMamba(arch, img_size=32, patch_size=8, directions=directions, **args).eval()


def mixer(directions: str) -> MambaMixer:
    torch.manual_seed(0)
    return MambaMixer(16, d_state=4, directions=directions)


def seen_by_patches(directions: str) -> torch.Tensor:
    """Which patches each patch sees through the first step: (rows, columns, rows, columns)."""
    step = DIRECTIONS[directions].blocks_per_step
    model = small(directions, cls_token=None, out_indices=step - 1, final_norm=False).double()
    image = torch.rand(1, 3, 24, 32, dtype=torch.float64, requires_grad=True)
    maps = model(image)[0].sum(1)[0]  # (rows, columns)
    seen = torch.zeros(*GRID, *GRID, dtype=torch.bool)
    for row, column in torch.cartesian_prod(*map(torch.arange, GRID)).tolist():
        (grad,) = torch.autograd.grad(maps[row, column], image, retain_graph=True)
        blocks = grad[0].abs().sum(0).unflatten(1, (-1, 8)).unflatten(0, (-1, 8))
        seen[row, column] = blocks.sum((1, 3)) > 0
    return seen


def test_what_a_patch_sees():
    place = torch.arange(12).view(GRID)
    before = place[:, :, None, None] >= place
    for directions in DIRECTIONS:
        seen, expected = seen_by_patches(directions), torch.ones(*GRID, *GRID, dtype=torch.bool)
        if directions == 'cross':
            row, column = torch.arange(3), torch.arange(4)
            below = row[:, None, None, None] < row[None, None, :, None]
            left = column[None, :, None, None] > column[None, None, None, :]
            expected = ~(below & left)
        elif directions in ('none', 'sequence'):
            expected = before
        assert torch.equal(seen, expected), directions
        assert DIRECTIONS[directions].reads_backward == seen[0, 0].all(), directions


def test_cross_adds_a_scan_of_the_columns_from_the_end():
    both, none, cross = mixer('ssm_conv'), mixer('none'), mixer('cross')
    cross.load_state_dict(both.state_dict())
    none.load_state_dict(both.state_dict(), strict=False)
    tokens = torch.randn(2, 12, 16)
    order = torch.arange(12).view(GRID).T.flatten()
    by_columns = torch.empty_like(tokens)
    by_columns[:, order] = 2 * both(tokens[:, order]) - none(tokens[:, order])
    expected = (none(tokens) + by_columns) / 2
    orders = DIRECTIONS['cross'].orders(12, GRID, None, tokens.device)
    torch.testing.assert_close(cross(tokens, *orders), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('cls_token', PLACES)
@pytest.mark.parametrize('size', [(8, 40), (40, 8)])
def test_cross_is_the_default_where_there_is_one_row_or_column(cls_token, size):
    cross, default = (small(name, cls_token=cls_token) for name in ('cross', 'ssm_conv'))
    assert cross.state_dict().keys() == default.state_dict().keys()
    image = torch.rand(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(cross(image)[0], default(image)[0], rtol=1e-5, atol=1e-6)
        image = torch.rand(2, 3, 24, 32)
        assert not torch.allclose(cross(image)[0], default(image)[0], atol=1e-3)


def test_class_tokens_keep_their_place_in_the_order_of_columns():
    def order(place: str | None, length: int) -> list[int]:
        return column_order(torch.arange(length), (2, 3), place).tolist()

    assert order(None, 6) == [0, 3, 1, 4, 2, 5]
    assert order('head', 7) == [0, 1, 4, 2, 5, 3, 6]
    assert order('middle', 7) == [0, 4, 1, 3, 5, 2, 6]
    assert order('double', 8) == [0, 1, 4, 2, 5, 3, 6, 7]


def test_only_cross_has_an_order_of_its_own():
    for name, directions in DIRECTIONS.items():
        orders = directions.orders(12, GRID, None, torch.device('cpu'))
        assert orders == () if name != 'cross' else (orders[0] is None and len(orders) == 2)


def test_mixers_have_the_parameters_of_their_directions():
    def backward(directions: str) -> set[str]:
        return {name.split('.')[0] for name, _ in mixer(directions).named_parameters()} - forward

    forward = {name.split('.')[0] for name, _ in mixer('none').named_parameters()}
    assert forward == {'in_proj', 'conv1d', 'x_proj', 'dt_proj', 'A_log', 'D', 'out_proj'}
    own = {'conv1d_b', 'x_proj_b', 'dt_proj_b', 'A_b_log', 'D_b'}
    assert backward('ssm_conv') == backward('cross') == own
    assert backward('ssm') == {'A_b_log'}
    assert backward('block') == backward('sequence') == set()


def test_reduction_is_a_choice_where_every_scan_has_its_own_parameters():
    for name, directions in DIRECTIONS.items():
        assert directions.scale('sum') == 1
        assert directions.scale('mean') == (0.5 if name in ('ssm_conv', 'cross') else 1)
