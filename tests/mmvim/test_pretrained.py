import pytest
import torch

from mmvim import VisionMamba

ARCH = dict(embed_dims=16, depth=2, d_state=4)


def build(checkpoint=None, **args) -> VisionMamba:
    args = {'arch': ARCH, 'img_size': 56, 'patch_size': 4, **args}
    init_cfg = checkpoint and dict(type='Pretrained', checkpoint=str(checkpoint))
    model = VisionMamba(**args, init_cfg=init_cfg)
    model.init_weights()
    return model


@pytest.fixture
def official(tmp_path):
    """A classifier with a middle class token in official format: 197 rows, a head."""
    torch.manual_seed(0)
    state_dict = build(cls_token='middle').state_dict()
    assert state_dict['pos_embed'].shape[1] == 197
    state_dict['head.weight'], state_dict['head.bias'] = torch.rand(10, 16), torch.rand(10)
    state_dict['rope.freqs_cos'] = state_dict['rope.freqs_sin'] = torch.rand(196, 16)
    path = tmp_path / 'vim_t_midclstok.pth'
    torch.save({'model': state_dict}, path)
    return path


def test_dense_model_reads_a_classifier_with_a_class_token(official):
    weights = torch.load(official, weights_only=True)['model']
    dense = build(official, cls_token=None)
    rows = weights['pos_embed']
    assert torch.equal(dense.pos_embed, torch.cat([rows[:, :98], rows[:, 99:]], dim=1))
    assert torch.equal(dense.layers[1].mixer.A_b_log, weights['layers.1.mixer.A_b_log'])


def test_init_cfg_may_be_a_list(official):
    weights = torch.load(official, weights_only=True)['model']
    init_cfg = [dict(type='TruncNormal', layer='Linear'), build(official).init_cfg]
    model = VisionMamba(ARCH, img_size=56, patch_size=4, init_cfg=init_cfg)
    model.init_weights()
    name = 'layers.0.mixer.in_proj.weight'
    assert torch.equal(model.state_dict()[name], weights[name])


def test_position_embedding_is_resized_to_img_size(official):
    dense = build(official, cls_token=None, img_size=(128, 96))
    assert dense.pos_embed.shape == (1, 32 * 24, 16)
    same_size = build(official, cls_token=None)
    # Stored at the pretraining size and resized on the fly, or resized when loaded: the same.
    image = torch.rand(1, 3, 128, 96)
    assert torch.allclose(dense(image)[0], same_size(image)[0], atol=1e-5)


def test_model_with_the_same_token_keeps_it(official):
    weights = torch.load(official, weights_only=True)['model']
    model = build(official, cls_token='middle', img_size=112)
    assert model.pos_embed.shape[1] == 28 * 28 + 1
    assert torch.equal(model.pos_embed[:, 28 * 14], weights['pos_embed'][:, 98])
    assert torch.equal(model.cls_token, weights['cls_token'])


def test_own_checkpoints_are_read_from_segmentors_too(official, tmp_path):
    source = build(cls_token=None)
    entries = {f'backbone.{key}': value for key, value in source.state_dict().items()}
    entries['decode_head.conv_seg.weight'] = torch.rand(3)
    torch.save({'state_dict': entries, 'meta': {}}, tmp_path / 'iter_1.pth')
    model = build(tmp_path / 'iter_1.pth', cls_token=None)
    assert all(map(torch.equal, model.state_dict().values(), source.state_dict().values()))


def test_wrong_arch_says_which_one_the_file_holds(tmp_path):
    torch.save({'model': VisionMamba('tiny').state_dict()}, tmp_path / 'tiny.pth')
    with pytest.raises(
        ValueError, match=r"tiny.pth holds arch 'tiny' .*192.* model is arch 'small'"
    ):
        build(tmp_path / 'tiny.pth', arch='small', img_size=224, patch_size=16)


def test_missing_and_left_over_keys_are_named_and_counted(official):
    content = torch.load(official, weights_only=True)
    for name in ('A_b_log', 'D_b'):
        del content['model'][f'layers.0.mixer.{name}']
    content['model']['layers.0.mixer.extra'] = torch.rand(1)
    torch.save(content, official)
    message = '2 missing: layers.0.mixer.A_b_log, layers.0.mixer.D_b; 1 left over: .*extra'
    with pytest.raises(ValueError, match=message):
        build(official)
    with pytest.raises(ValueError, match='left over: .*conv1d_b'):
        build(official, directions='none')


def test_files_of_other_models_are_told_apart(tmp_path):
    torch.save({'conv1.weight': torch.rand(1), 'fc.bias': torch.rand(1)}, tmp_path / 'resnet.pth')
    with pytest.raises(ValueError, match='holds no VisionMamba weights.*conv1'):
        build(tmp_path / 'resnet.pth')


def test_final_norm_is_ignored_where_the_model_has_none(official):
    assert build(official, feature_source='mixer').norm_f is None


def test_loading_into_a_whole_model_resizes_as_well(official):
    """What runner.load_checkpoint does: mmengine's own, not strict, load_state_dict."""
    from mmengine.runner.checkpoint import load_state_dict

    model = torch.nn.Module()
    model.backbone = build(cls_token=None, img_size=64)
    weights = build(official, cls_token=None).state_dict()
    load_state_dict(model, {f'backbone.{key}': value for key, value in weights.items()})
    assert model.backbone.pos_embed.shape[1] == 16 * 16
    assert torch.equal(model.backbone.layers[0].mixer.D, weights['layers.0.mixer.D'])
