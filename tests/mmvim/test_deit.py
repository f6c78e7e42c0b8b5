import pytest
import torch

from mmvim import DeiT, VisionMamba

SMALL = dict(embed_dims=24, depth=4, num_heads=3)
WINDOWED = dict(cls_token=None, window_size=2)


def small(**args) -> DeiT:
    torch.manual_seed(0)
    return DeiT(**{'arch': SMALL, 'img_size': 32, 'patch_size': 8, **args})


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_sizes_are_those_of_the_official_models():
    for name, width, expected in (
        ('tiny', 192, 5_717_416),
        ('small', 384, 22_050_664),
        ('base', 768, 86_567_656),
    ):
        assert count(DeiT(name)) + count(torch.nn.Linear(width, 1000)) == expected


def test_nano_is_as_large_as_vims():
    ours, vims = (count(kind('nano', cls_token=None)) for kind in (DeiT, VisionMamba))
    assert (ours, vims) == (1_099_392, 1_066_176)


def test_patches_may_overlap():
    image = torch.rand(2, 3, 32, 40)
    apart, overlapping = small(stride=8).eval(), small(stride=4).eval()
    assert torch.equal(apart(image)[0], small().eval()(image)[0])
    assert overlapping(image)[0].shape == (2, 24, 7, 9)
    overlapping.patch_embed.load_state_dict(apart.patch_embed.state_dict())
    tokens, _ = overlapping.patch_embed(image)
    every_other, _ = apart.patch_embed(image)
    tokens = tokens.unflatten(1, (7, 9))[:, ::2, ::2].flatten(1, 2)
    torch.testing.assert_close(tokens, every_other)


def test_equals_the_vision_transformer_of_mmseg():
    from mmseg.models.backbones import VisionTransformer

    theirs = VisionTransformer(
        (32, 32), 8, embed_dims=24, num_layers=4, num_heads=3, qkv_bias=True, final_norm=True,
        out_indices=(1, 3), norm_cfg=dict(type='LN', eps=1e-6), patch_bias=True,
    )  # fmt: skip
    names = [
        ('patch_embed.proj', 'patch_embed.projection'),
        ('blocks.', 'layers.'),
        ('norm1', 'ln1'),
        ('norm2', 'ln2'),
        ('norm.', 'ln1.'),
        ('attn.qkv.', 'attn.attn.in_proj_'),
        ('attn.proj', 'attn.attn.out_proj'),
        ('mlp.fc1', 'ffn.layers.0.0'),
        ('mlp.fc2', 'ffn.layers.1'),
    ]
    model = small(out_indices=(1, 3))
    state_dict = {}
    for name, value in model.state_dict().items():
        value.normal_(std=0.2)
        for ours, other in names:
            name = name.replace(ours, other)
        state_dict[name] = value
    theirs.load_state_dict(state_dict)
    image = torch.rand(2, 3, 40, 32)
    for ours, expected in zip(model(image), theirs(image), strict=True):
        assert torch.allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize('args', [{}, dict(cls_token=None), WINDOWED, dict(WINDOWED, rel_pos=True)])
@pytest.mark.parametrize('size', [(32, 32), (64, 40), (33, 47), (8, 8), (5, 70)])
def test_any_input_size_gives_a_map_of_its_grid(size, args):
    model = small(out_indices=(1, 3), **args)
    grid = tuple(-(-side // 8) for side in size)
    maps = model(torch.rand(2, 3, *size))
    assert [tuple(m.shape) for m in maps] == [(2, 24, *grid)] * 2
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize('args', [{}, dict(WINDOWED, window_size=3, rel_pos=True)])
def test_fused_and_explicit_attention_agree_with_gradients(args):
    image, results = torch.rand(2, 3, 40, 32), []
    for attention in ('fused', 'explicit'):
        model = small(attention=attention, **args)
        (out,) = model(image)
        out.square().mean().backward()
        results.append([out, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize('window', [5, 8])
def test_windows_that_hold_the_whole_grid_are_global_attention(window):
    image = torch.rand(2, 3, 33, 24)  # a grid of 5 × 3
    windowed = small(cls_token=None, window_size=window, global_indices=())(image)[0]
    assert torch.allclose(windowed, small(cls_token=None)(image)[0], atol=1e-5)


def test_global_blocks_are_spread_evenly_and_selectable():
    def global_blocks(**args) -> list[int]:
        blocks = small(**args).blocks
        return [index for index, block in enumerate(blocks) if block.window_size is None]

    deep = dict(WINDOWED, arch=dict(SMALL, depth=12))
    assert global_blocks(**deep) == [2, 5, 8, 11]  # ViTDet's
    assert global_blocks(**deep, global_indices=(0, 3)) == [0, 3]
    assert global_blocks(**WINDOWED, global_indices=()) == []
    assert global_blocks() == [0, 1, 2, 3]


def test_windows_limit_what_a_patch_sees():
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    small(**WINDOWED, global_indices=())(image)[0][..., 0, 0].sum().backward()
    seen = image.grad.abs().sum((0, 1)) > 0
    assert seen[:16, :16].all() and not seen[16:].any() and not seen[:, 16:].any()


@pytest.mark.parametrize(
    ('args', 'shape'),
    [
        (dict(out_type='featmap'), (2, 24, 4, 4)),
        (dict(out_type='cls_token'), (2, 24)),
        (dict(out_type='avg_featmap'), (2, 24)),
        (dict(out_type='raw'), (2, 17, 24)),
        (dict(out_type='raw', cls_token=None), (2, 16, 24)),
    ],
)
def test_out_types(args, shape):
    assert small(**args)(torch.rand(2, 3, 32, 32))[0].shape == shape


def test_recomputation_changes_memory_only():
    image, results = torch.rand(2, 3, 32, 32), []
    for with_cp in (False, True):
        model = small(with_cp=with_cp, drop_path_rate=0.5, **WINDOWED).train()
        torch.manual_seed(1)
        (out,) = model(image)
        out.square().mean().backward()
        results.append([out, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_frozen_and_unused_blocks_do_not_learn():
    model = small(frozen_stages=1, out_indices=2, drop_path_rate=0.5).train()
    model(torch.rand(2, 3, 32, 32))[0].sum().backward()
    still = ('patch_embed', 'pos_embed', 'cls_token', 'blocks.0.', 'blocks.3.')
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(still), name
    assert not model.blocks[0].training and model.blocks[1].training


def test_mixed_precision_of_windows_with_relative_positions():
    with torch.autocast('cpu', torch.bfloat16):
        (out,) = small(window_size=3, cls_token=None, rel_pos=True)(torch.rand(1, 3, 32, 32))
    assert out.isfinite().all()


@pytest.fixture
def official(tmp_path):
    """A file as Facebook released them: class token at the head, classifier."""
    weights = small().state_dict()
    weights['head.weight'], weights['head.bias'] = torch.rand(10, 24), torch.rand(10)
    torch.save({'model': weights}, tmp_path / 'deit_tiny_patch16_224-a1311bcf.pth')
    return tmp_path / 'deit_tiny_patch16_224-a1311bcf.pth'


def loaded(path, **args) -> DeiT:
    model = small(init_cfg=dict(type='Pretrained', checkpoint=str(path)), **args)
    torch.nn.init.zeros_(model.blocks[0].attn.qkv.weight)
    model.init_weights()
    return model


def test_official_files_load_as_they_are(official):
    weights = torch.load(official, weights_only=True)['model']
    model = loaded(official)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_official_files_load_without_class_token_at_another_size_and_with_windows(official):
    weights = torch.load(official, weights_only=True)['model']
    model = loaded(official, **WINDOWED, rel_pos=True)
    assert torch.equal(model.pos_embed, weights['pos_embed'][:, 1:])
    assert torch.equal(model.blocks[0].attn.qkv.weight, weights['blocks.0.attn.qkv.weight'])
    larger, image = loaded(official, cls_token=None, img_size=(64, 40)), torch.rand(1, 3, 64, 40)
    assert larger.pos_embed.shape[1] == 8 * 5
    # Relative positions start at zero: only the windows make a difference.
    plain = loaded(official, cls_token=None)
    assert torch.allclose(larger(image)[0], plain(image)[0], atol=1e-5)
    relative = loaded(official, cls_token=None, rel_pos=True)
    assert torch.allclose(relative(image)[0], plain(image)[0], atol=1e-5)


def test_files_of_other_sizes_and_models_are_refused(official, tmp_path):
    with pytest.raises(ValueError, match=r'holds arch .*embed_dims=24, depth=4.*model is arch'):
        loaded(official, arch='tiny')
    with pytest.raises(ValueError, match=r'does not fit this DeiT .*left over: .*qkv.bias'):
        loaded(official, qkv_bias=False)
    torch.save({'layers.0.mixer.D': torch.rand(1)}, tmp_path / 'vim.pth')
    with pytest.raises(ValueError, match='holds no DeiT weights'):
        loaded(tmp_path / 'vim.pth')


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (dict(arch='large'), "arch must be one of .*'tiny'.* got 'large'"),
        (dict(arch=dict(embed_dims=8, depth=2)), r"missing: \['num_heads'\]"),
        (dict(arch=dict(SMALL, num_heads=5)), r'embed_dims \(24\) must be a multiple of num_heads'),
        (dict(cls_token='middle'), "cls_token must be one of .* got 'middle'"),
        (dict(attention='flash'), "attention must be one of .*'fused', 'explicit'.* got 'flash'"),
        (dict(window_size=2), "need cls_token=None, got 'head'"),
        (dict(rel_pos=True), "need cls_token=None, got 'head'"),
        (dict(window_size=0, cls_token=None), 'window_size must be at least 1, got 0'),
        (dict(global_indices=(1,)), r'global_indices needs window_size.* got \(1,\)'),
        (dict(WINDOWED, global_indices=(4,)), r'must lie in 0 … 3, got \(4,\)'),
        (dict(out_type='cls_token', cls_token=None), 'needs a class token'),
        (dict(out_type='map'), 'out_type must be one of'),
        (dict(out_indices=4), r'out_indices must lie in 0 … 3 \(depth 4\).* got 4'),
        (dict(arch=dict(SMALL, num_heads=0)), r"arch\['num_heads'\] must be at least 1, got 0"),
        (dict(arch=dict(SMALL, mlp_ratio=0)), r"arch\['mlp_ratio'\] must be positive.* got 0"),
        (dict(rel_pos=None), 'rel_pos must be True or False, got None'),
        (dict(remainder='crop'), "remainder must be one of .* got 'crop'"),
        (dict(frozen_stages=5), r'frozen_stages must lie in -1 … depth \(4\), got 5'),
    ],
)
def test_bad_arguments_are_named(args, message):
    with pytest.raises((TypeError, ValueError), match=message):
        small(**args)
