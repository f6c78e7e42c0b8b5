import copy

import pytest
import torch

from mmvim import VisionMamba
from mmvim.models.sequence import insert_class_tokens, resize_pos_embed, split_class_tokens

SMALL = dict(embed_dims=16, depth=4, d_state=4)


def small(**args) -> VisionMamba:
    torch.manual_seed(0)
    return VisionMamba(**{'arch': SMALL, 'img_size': 32, 'patch_size': 8, **args})


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_sizes_match_the_paper():
    tiny = VisionMamba('tiny', cls_token='middle')
    assert count(tiny) == 6_955_008
    assert count(tiny) + count(torch.nn.Linear(192, 1000)) == 7_148_008
    assert count(VisionMamba('small')) + count(torch.nn.Linear(384, 1000)) == 25_796_584
    base = count(VisionMamba('base')) + count(torch.nn.Linear(768, 1000))
    assert round(base / 1e6, 3) == 97.598


def test_initial_values_follow_the_recipe():
    torch.manual_seed(0)
    model = VisionMamba(dict(embed_dims=192, depth=4))
    mixer = model.layers[0].mixer
    assert torch.equal(mixer.A_log.exp().round(), torch.arange(1.0, 17).repeat(384, 1))
    assert torch.equal(mixer.D_b, torch.ones(384))
    delta = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 1e-4 <= delta.min() < 2e-3 and 5e-2 < delta.max() <= 0.1 + 1e-6
    bound = 1 / (384**0.5 * 4**0.5)  # kaiming-uniform with a = √5, over √depth
    assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound
    assert 0.015 < model.pos_embed.std() < 0.025
    assert abs(model.patch_embed.proj.weight.std() * 768**0.5 - 1) < 0.05


@pytest.mark.parametrize('cls_token', [None, 'middle', 'head', 'double'])
@pytest.mark.parametrize('size', [(32, 32), (64, 40), (33, 47), (8, 8), (5, 70)])
def test_any_input_size_gives_a_map_of_its_grid(size, cls_token):
    model = small(cls_token=cls_token, out_indices=(1, 3))
    grid = tuple(-(-side // 8) for side in size)
    maps = model(torch.rand(2, 3, *size))
    assert [tuple(m.shape) for m in maps] == [(2, 16, *grid)] * 2
    assert all(m.isfinite().all() for m in maps)


def test_patches_need_not_be_square():
    assert (
        small(patch_size=(8, 8), stride=(4, 4)).state_dict().keys() == small().state_dict().keys()
    )
    model = small(patch_size=(8, 4), stride=(4, 4), img_size=(32, 16), rope=True)
    assert model.grid == (7, 4)
    assert model.pos_embed.shape == (1, 7 * 4 + 1, 16)
    assert model(torch.rand(1, 3, 16, 17))[0].shape == (1, 16, 3, 5)


def test_padding_is_zeros_at_right_and_bottom():
    model = small(cls_token=None)
    image = torch.rand(1, 3, 30, 39)
    padded = torch.zeros(1, 3, 32, 40)
    padded[..., :30, :39] = image
    assert torch.equal(model(image)[0], model(padded)[0])


def test_overlapping_patches_cover_the_whole_image():
    model = small(stride=4)
    assert model.grid == (7, 7)
    assert model(torch.rand(1, 3, 32, 34))[0].shape == (1, 16, 7, 8)


@pytest.mark.parametrize(
    ('out_type', 'cls_token', 'shape'),
    [
        ('featmap', 'middle', (2, 16, 4, 4)),
        ('cls_token', 'double', (2, 16)),
        ('avg_featmap', 'head', (2, 16)),
        ('raw', None, (2, 16, 16)),
        ('raw', 'middle', (2, 17, 16)),
        ('raw', 'double', (2, 18, 16)),
    ],
)
def test_out_types(out_type, cls_token, shape):
    (out,) = small(out_type=out_type, cls_token=cls_token)(torch.rand(2, 3, 32, 32))
    assert out.shape == shape


def test_out_types_agree_with_each_other():
    image = torch.rand(2, 3, 32, 32)
    raw, featmap, average, token = (
        small(out_type=t).eval()(image)[0] for t in ('raw', 'featmap', 'avg_featmap', 'cls_token')
    )
    patches, tokens = split_class_tokens(raw, 'middle')
    assert torch.equal(featmap.flatten(2).transpose(1, 2), patches)
    assert torch.allclose(average, patches.mean(1)) and torch.equal(token, tokens[:, 0])


def test_only_the_last_out_index_is_normed():
    normed, plain = small(out_indices=(1, 2)), small(out_indices=(1, 2), final_norm=False)
    image = torch.rand(1, 3, 32, 32)
    (first, last), (first_plain, last_plain) = normed(image), plain(image)
    assert torch.equal(first, first_plain)
    tokens = last_plain.permute(0, 2, 3, 1)
    assert torch.allclose(last.permute(0, 2, 3, 1), normed.norm_f(tokens), atol=1e-6)


def test_blocks_behind_the_last_out_index_are_left_out():
    model = small(out_indices=(0, 1))
    sum(m.sum() for m in model(torch.rand(1, 3, 32, 32))).backward()
    for name, parameter in model.named_parameters():
        used = not name.startswith(('layers.2.', 'layers.3.'))
        assert parameter.requires_grad == used and (parameter.grad is not None) == used, name


@pytest.mark.parametrize('directions', ['ssm_conv', 'block'])
def test_recomputation_changes_memory_only(directions):
    image = torch.rand(2, 3, 32, 32)
    results = []
    for with_cp in (False, True):
        model = small(directions=directions, with_cp=with_cp, drop_path_rate=0.5).train()
        torch.manual_seed(1)
        (out,) = model(image)
        out.square().mean().backward()
        results.append([out, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_recomputation_stores_less():
    def stored_bytes(**args) -> int:
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model = small(**args)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.rand(2, 3, 64, 64))
        return sum(sizes.values())

    everything = stored_bytes(recompute='none')
    by_mixers = stored_bytes(recompute='activations')
    assert stored_bytes(recompute='all') < by_mixers < 0.6 * everything
    assert stored_bytes(recompute='none', with_cp=True) < everything / 3


def test_the_residual_stream_stays_in_float32_under_autocast():
    model = small(out_indices=(0, 1, 2, 3), final_norm=False)
    with torch.autocast('cpu', torch.bfloat16):
        maps = model(torch.rand(1, 3, 32, 32))
        mixed = small(feature_source='mixer')(torch.rand(1, 3, 32, 32))[0]
    assert {m.dtype for m in maps} == {torch.float32}
    assert mixed.dtype == torch.bfloat16


@pytest.mark.parametrize('cls_token', [None, 'middle'])
def test_tokens_lie_next_to_each_other(cls_token):
    """Sums of them keep their strides, and torch's norm copies what is laid out otherwise."""
    tokens, _ = small(cls_token=cls_token)._embed(torch.rand(2, 3, 32, 48))
    assert tokens.is_contiguous()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_patches_are_embedded_in_float32_where_halves_are_slow(dtype):
    embed, image = small().patch_embed, torch.rand(2, 3, 32, 48)
    expected, _ = embed(image)
    with torch.autocast('cpu', dtype):
        tokens, _ = embed(image)
    assert torch.equal(tokens, expected.to(dtype))
    tokens.float().sum().backward()
    assert embed.proj.weight.grad.dtype == torch.float32
    narrow = copy.deepcopy(embed).to(dtype)
    tokens, _ = narrow(image.to(dtype))
    expected, _ = narrow.float()(image.to(dtype).float())
    assert torch.equal(tokens, expected.to(dtype))


def test_a_model_in_bfloat16_runs():
    image = torch.rand(1, 3, 32, 32)
    (out,) = small().bfloat16()(image.bfloat16())
    assert out.dtype == torch.bfloat16
    (expected,) = small()(image)
    assert (out - expected).norm() / expected.norm() < 0.05


def test_frozen_stages_neither_learn_nor_drop():
    model = small(frozen_stages=2, drop_path_rate=0.5).train()
    model(torch.rand(2, 3, 32, 32))[0].sum().backward()
    frozen = ('patch_embed', 'pos_embed', 'cls_token', 'layers.0.', 'layers.1.')
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name
    assert not model.layers[1].training and model.layers[2].training
    assert all(p.requires_grad for p in small(frozen_stages=-1).parameters())
    assert not small(frozen_stages=0).pos_embed.requires_grad


def test_drop_path_leaves_evaluation_alone():
    image = torch.rand(4, 3, 32, 32)
    plain, dropping = small().eval(), small(drop_path_rate=0.9)
    assert torch.equal(dropping.eval()(image)[0], plain(image)[0])
    assert not torch.allclose(dropping.train()(image)[0], plain(image)[0])


def test_sequence_direction_flips_in_training_only_and_flips_back():
    model = small(directions='sequence', cls_token=None, pos_embed=False)
    image = torch.rand(1, 3, 32, 32)
    model.eval()
    assert torch.equal(model(image)[0], model(image)[0])
    model.train()
    outs = {round(model(image)[0].sum().item(), 4) for _ in range(20)}
    assert len(outs) == 2
    # With the order of tokens all that is left, flipping before and after is flipping the image.
    flipped = model.eval()(image.flip(2, 3))[0].flip(2, 3)
    assert flipped.shape == (1, 16, 4, 4)


def test_rotary_embedding_takes_odd_counts_and_class_tokens():
    for cls_token in (None, 'middle', 'head', 'double'):
        model = small(rope=True, rope_residual=True, cls_token=cls_token)
        assert model(torch.rand(1, 3, 24, 40))[0].shape == (1, 16, 3, 5)


@pytest.mark.parametrize('place', [None, 'middle', 'head', 'double'])
@pytest.mark.parametrize('length', [1, 4, 9])
def test_class_tokens_go_in_and_come_out(place, length):
    patches = torch.rand(2, length, 3)
    tokens = torch.rand(2, {None: 0, 'double': 2}.get(place, 1), 3)
    sequence = insert_class_tokens(patches, tokens, place)
    assert sequence.shape[1] == length + tokens.shape[1]
    for ours, original in zip(split_class_tokens(sequence, place), (patches, tokens), strict=True):
        assert torch.equal(ours, original)
    if place == 'middle':
        assert torch.equal(sequence[:, length // 2], tokens[:, 0])


def test_position_embedding_is_resized_around_its_class_token():
    embedding = torch.rand(1, 17, 8)
    resized = resize_pos_embed(embedding, (4, 4), (8, 6), 'middle')
    assert resized.shape == (1, 49, 8)
    assert torch.equal(resized[:, 24], embedding[:, 8])
    assert resize_pos_embed(embedding, (4, 4), (4, 4), 'middle') is embedding
    constant = resize_pos_embed(torch.ones(1, 16, 2), (4, 4), (5, 9), None)
    assert torch.allclose(constant, torch.ones(1, 45, 2))


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (dict(arch='large'), "arch must be one of .*'tiny'.* got 'large'"),
        (dict(arch=dict(embed_dims=8)), r"missing: \['depth'\]"),
        (dict(arch=dict(embed_dims=8, depth=2, heads=3)), r"unknown: \['heads'\]"),
        (dict(out_indices=4), r'out_indices must lie in 0 … 3 \(depth 4\).* got 4'),
        (dict(out_indices=(1, 9)), r'got \(1, 9\)'),
        (dict(out_indices=(2, 1)), r'out_indices must increase, got \(2, 1\)'),
        (dict(out_indices=()), 'out_indices must lie'),
        (dict(directions='both'), "directions must be one of .* got 'both'"),
        (dict(reduction='max'), 'reduction must be one of'),
        (dict(cls_token='tail'), 'cls_token must be one of'),
        (dict(norm='batch'), 'norm must be one of'),
        (dict(out_type='map'), 'out_type must be one of'),
        (dict(feature_source='hidden'), 'feature_source must be one of'),
        (dict(out_type='cls_token', cls_token=None), 'needs a class token'),
        (dict(rope_residual=True), 'need rope=True'),
        (dict(stride=9), r'stride must be in 1 … patch_size \(8\), got 9'),
        (dict(frozen_stages=5), r'frozen_stages must lie in -1 … depth \(4\), got 5'),
        (dict(arch=16), r"arch must be one of .*'tiny'.* or a dict, got 16"),
        (dict(arch=dict(SMALL, embed_dims=0)), r"arch\['embed_dims'\] must be at least 1, got 0"),
        (dict(arch=dict(SMALL, depth=2.5)), r"arch\['depth'\] must be an integer, got 2.5"),
        (dict(arch=dict(SMALL, d_state=0)), 'd_state must be at least 1, got 0'),
        (dict(arch=dict(SMALL, d_conv=-1)), 'd_conv must be at least 1, got -1'),
        (dict(arch=dict(SMALL, expand='2')), "expand must be an integer, got '2'"),
        (dict(arch=dict(SMALL, embed_dims=18), rope=True), 'divisible by 4, got 18'),
        (dict(img_size=0), 'img_size must be at least 1, got 0'),
        (dict(img_size=(32, 32, 3)), r'img_size must be one integer or two, got \(32, 32, 3\)'),
        (dict(img_size='32'), "img_size must be an integer, got '32'"),
        (dict(patch_size=8.0), 'patch_size must be an integer, got 8.0'),
        (dict(patch_size=True), 'patch_size must be an integer, got True'),
        (dict(stride=(4, 9)), r'stride must be in 1 … patch_size \(8\), got \(4, 9\)'),
        (dict(stride=0), 'stride must be at least 1, got 0'),
        (dict(in_channels=0), 'in_channels must be at least 1, got 0'),
        (dict(cls_token=1), 'cls_token must be one of .* got 1'),
        (dict(pos_embed='no'), "pos_embed must be True or False, got 'no'"),
        (dict(rope=1), 'rope must be True or False, got 1'),
        (dict(rope=True, rope_grid=0), 'rope_grid must be positive and finite, got 0'),
        (dict(rope_grid=14), 'rope_grid=14 need rope=True'),
        (dict(layer_scale='1e-5'), "layer_scale must be a number, got '1e-5'"),
        (dict(layer_scale=float('nan')), 'layer_scale must be positive and finite, got nan'),
        (dict(drop_rate=1.0), 'drop_rate must be at least 0 and below 1, got 1.0'),
        (dict(drop_path_rate=-0.1), 'drop_path_rate must be at least 0 and below 1, got -0.1'),
        (dict(out_indices=1.0), 'out_indices must be an integer, got 1.0'),
        (dict(out_indices=-5), 'out_indices must be at least -4, got -5'),
        (dict(frozen_stages='all'), "frozen_stages must be an integer, got 'all'"),
        (dict(frozen_stages=-2), 'frozen_stages must be at least -1, got -2'),
        (dict(with_cp=2), 'with_cp must be True or False, got 2'),
        (dict(recompute='scan'), "recompute must be one of .* got 'scan'"),
        (dict(backend='gpu'), "backend must be one of .*'torch'.* got 'gpu'"),
        (dict(remainder='crop'), "remainder must be one of .*'pad', 'resize', None.* got 'crop'"),
        *(
            (
                dict(directions=directions, cls_token='head', out_type='cls_token'),
                rf"directions='{directions}' reads forward only.* got 'head'",
            )
            for directions in ('none', 'sequence')
        ),
        (dict(directions='block', out_indices=2), 'must end a group of 2 blocks'),
        (
            dict(directions='block', arch=dict(embed_dims=8, depth=3)),
            'depth must be a multiple, got 3',
        ),
    ],
)
def test_bad_arguments_are_named(args, message):
    with pytest.raises((TypeError, ValueError), match=message):
        small(**args)
