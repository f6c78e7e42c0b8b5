import pytest
import torch

from mmvim.models.attention import Attention, distances, join_windows, split_windows


def attention(**args) -> Attention:
    torch.manual_seed(0)
    module = Attention(**{'embed_dims': 24, 'num_heads': 3, **args})
    for table in (module.rel_pos_h, module.rel_pos_w):
        if table is not None:
            torch.nn.init.normal_(table)
    return module


@pytest.mark.parametrize('args', [{}, dict(qkv_bias=False), dict(rel_pos_size=(3, 5))])
@pytest.mark.parametrize('masked', [False, True])
def test_fused_equals_explicit_with_gradients(args, masked):
    tokens, upstream = torch.randn(2, 15, 24), torch.randn(2, 15, 24)
    bias = None
    if masked:
        bias = torch.zeros(2, 1, 1, 15)
        bias[..., 11:] = float('-inf')
    results = []
    for kind in ('fused', 'explicit'):
        module, x = attention(attention=kind, **args), tokens.clone().requires_grad_()
        out = module(x, (3, 5), bias)
        out.backward(upstream)
        results.append([out, x.grad, *(parameter.grad for parameter in module.parameters())])
    for fused, explicit in zip(*results, strict=True):
        assert torch.allclose(fused, explicit, atol=1e-5)


@pytest.mark.parametrize('kind', ['fused', 'explicit'])
def test_equals_multihead_attention_of_torch(kind):
    module = attention(attention=kind)
    torch.nn.init.normal_(module.qkv.bias)
    theirs = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.in_proj_weight, theirs.in_proj_bias = module.qkv.weight, module.qkv.bias
    theirs.out_proj.load_state_dict(module.proj.state_dict())
    tokens = torch.randn(2, 7, 24)
    assert torch.allclose(module(tokens, (1, 7)), theirs(tokens, tokens, tokens)[0], atol=1e-5)


def test_relative_positions_add_a_term_for_rows_and_one_for_columns():
    rows, columns = grid = 3, 4
    module = attention(rel_pos_size=grid)
    q = torch.randn(1, 3, 12, 8)
    bias = module._position_bias(q, grid)
    for i in range(12):
        for j in range(12):
            down, across = i // columns - j // columns, i % columns - j % columns
            row = module.rel_pos_h[down + rows - 1] + module.rel_pos_w[across + columns - 1]
            assert torch.allclose(bias[0, :, i, j], q[0, :, i] @ row, atol=1e-5)


def test_table_of_distances_is_resized_linearly():
    table = torch.arange(-2.0, 3)[:, None]  # distances -2 … 2 of a side of 3
    assert distances(table, 3)[0, :, 0].tolist() == [0, -1, -2]
    wide = distances(table, 5)
    assert wide.shape == (5, 5, 1)
    assert wide.diagonal().abs().max() < 1e-6
    assert torch.allclose(wide, -wide.transpose(0, 1), atol=1e-6)


@pytest.mark.parametrize('grid', [(4, 6), (5, 7), (2, 2), (1, 9), (3, 8)])
@pytest.mark.parametrize('window', [1, 2, 3, 8])
def test_windows_go_out_and_come_back(grid, window):
    tokens = torch.randn(2, grid[0] * grid[1], 4)
    windows, _ = split_windows(tokens, grid, window)
    assert windows.shape[1:] == (window**2, 4)
    assert torch.equal(join_windows(windows, grid, window), tokens)


def test_windows_are_squares_of_neighbours_and_filling_is_masked():
    tokens = torch.arange(1.0, 13).view(1, 12, 1)  # 3 rows of 4
    windows, bias = split_windows(tokens, (3, 4), 2)
    assert windows[..., 0].tolist() == [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 0, 0], [11, 12, 0, 0]]
    assert torch.equal(bias[:, 0, 0].isinf(), windows[..., 0] == 0)
    assert bias[:2].abs().sum() == 0
    assert split_windows(tokens, (3, 4), 1)[1] is None


@pytest.mark.parametrize('kind', ['fused', 'explicit'])
def test_tokens_attend_within_their_window_only(kind):
    module, tokens = attention(attention=kind), torch.randn(1, 35, 24)
    windows, bias = split_windows(tokens, (5, 7), 3)
    out = join_windows(module(windows, (3, 3), bias), (5, 7), 3)
    image = tokens.unflatten(1, (5, 7))
    for rows in (slice(0, 3), slice(3, 5)):
        for columns in (slice(0, 3), slice(3, 6), slice(6, 7)):
            part = image[:, rows, columns]
            expected = module(part.flatten(1, 2), part.shape[1:3]).view_as(part)
            found = out.unflatten(1, (5, 7))[:, rows, columns]
            assert torch.allclose(found, expected, atol=1e-5)
