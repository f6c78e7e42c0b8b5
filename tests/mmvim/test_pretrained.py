import pytest
import torch
from mmengine.runner.checkpoint import weights_to_cpu

from mmvim import VisionMamba
from mmvim.models import pretrained
from mmvim.models.pretrained import load_pretrained
from mmvim.models.sequence import resize_pos_embed
from mmvim.utils import CheckpointError

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
    state_dict = dict(build(cls_token='middle').state_dict())  # nothing said of the grid
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


@pytest.mark.parametrize(
    'change, reason',
    [
        (lambda x: (10 * x).to(torch.int8), 'is torch.int8, not torch.float32'),
        (lambda x: x > 0, 'is torch.bool, not torch.float32'),
        (lambda x: x * 1j, 'is torch.complex64, not torch.float32'),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), 'is torch.qint8'),
        (lambda x: x.to_sparse(), 'is torch.sparse_coo'),
        (lambda x: x.to('meta'), 'is without data'),
    ],
)
@pytest.mark.parametrize('name', ['pos_embed', 'layers.1.mixer.D'])
def test_what_would_become_other_numbers_is_refused(official, name, change, reason):
    content = torch.load(official, weights_only=True)
    content['model'][name] = change(content['model'][name])
    torch.save(content, official)
    with pytest.raises(CheckpointError, match=f'vim_t_midclstok.pth: {name} {reason}'):
        build(official)


@pytest.mark.parametrize(
    ('name', 'shape'),
    [
        (name, shape)
        for name, dimensions in (
            ('pos_embed', 3),
            ('patch_embed.proj.weight', 4),
            ('layers.1.mixer.D', 1),
        )
        for shape in ((), (3,), (0,), (1, 197, 16, 1))
        if len(shape) != dimensions
    ],
)
@pytest.mark.parametrize('bands', [None, 'mean'])
def test_another_number_of_dimensions_is_told(official, name, shape, bands):
    model = build(cls_token=None)
    content = torch.load(official, weights_only=True)
    content['model'][name] = torch.ones(shape)
    torch.save(content, official)
    with pytest.raises(CheckpointError, match=f'{name} has shape'):
        load_pretrained(model, str(official), bands=bands)


@pytest.mark.parametrize(
    'said', [dict(grid='ab'), dict(grid=[0, 4]), dict(grid=[14.0, 14.0]), dict(cls_token=['head'])]
)
def test_nonsense_about_the_grid_is_told(tmp_path, said):
    weights = build(cls_token='head').state_dict()
    weights._metadata[''].update(said)
    torch.save({'state_dict': weights}, tmp_path / 'lies.pth')
    with pytest.raises(CheckpointError, match='lies.pth: what it says of its grid is'):
        build(tmp_path / 'lies.pth', cls_token='head')


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_are_converted(official, dtype):
    content = torch.load(official, weights_only=True)
    weights = {key: value.to(dtype) for key, value in content['model'].items()}
    torch.save({'model': weights}, official)
    name = 'layers.1.mixer.D'
    assert torch.equal(build(official).state_dict()[name], weights[name].float())


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


def held_by(grid: tuple[int, int], **args) -> VisionMamba:
    """A model without class tokens whose position embedding stands for this grid."""
    torch.manual_seed(1)
    return build(cls_token=None, img_size=(grid[0] * 4, grid[1] * 4), **args)


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """What is said of each file, the newest last."""
    lines = []
    monkeypatch.setattr(pretrained, 'print_log', lambda line, logger: lines.append(line))
    return lines


@pytest.mark.parametrize('whole_model', [False, True])
def test_the_grid_is_stored_and_read(tmp_path, log, whole_model):
    """16 × 64 has the area of 32 × 32, and 8 × 32 that of 16 × 16."""
    for source, target in (((16, 64), (32, 32)), ((8, 32), (16, 16)), ((16, 16), (8, 32))):
        model = held_by(source)
        saved = torch.nn.ModuleDict({'backbone': model}) if whole_model else model
        torch.save({'state_dict': weights_to_cpu(saved.state_dict())}, tmp_path / 'own.pth')
        loaded = held_by(target, checkpoint=tmp_path / 'own.pth')
        resized = resize_pos_embed(model.pos_embed, source, target, None)
        assert torch.equal(loaded.pos_embed, resized)
        assert not torch.equal(loaded.pos_embed, model.pos_embed)
        assert '({} × {} → {} × {})'.format(*source, *target) in log[-1]
        assert 'taken for' not in log[-1]


def test_state_dicts_carry_the_grid_between_modules():
    source, target = held_by((16, 64)), held_by((32, 32))
    keys = list(source.state_dict())
    assert keys == [name for name, _ in source.named_parameters()]  # it is not among the entries
    target.load_state_dict(source.state_dict())
    assert torch.equal(
        target.pos_embed, resize_pos_embed(source.pos_embed, (16, 64), (32, 32), None)
    )
    # Without a word on it, entries of the right number are the module's own, as in torch.
    other = held_by((16, 64))
    other.load_state_dict(dict(source.state_dict()))
    assert torch.equal(other.pos_embed, source.pos_embed)


def test_a_grid_that_a_file_does_not_say_is_a_square_or_stated(tmp_path, log):
    model = held_by((8, 32))
    torch.save({'model': dict(model.state_dict())}, tmp_path / 'silent.pth')
    file = tmp_path / 'silent.pth'
    square = held_by((16, 16), checkpoint=file)
    assert torch.equal(square.pos_embed, model.pos_embed)
    assert 'pos_embed taken for 16 × 16 patches, as the file does not say' in log[-1]
    with pytest.raises(CheckpointError, match=r'may be 8 × 32.*or 16 × 16.*: grid=.* tells'):
        held_by((8, 32), checkpoint=file)

    def stated(target, grid):
        init_cfg = dict(type='Pretrained', checkpoint=str(file), grid=grid)
        other = held_by(target)
        other.init_cfg = init_cfg
        other._is_init = False
        other.init_weights()
        return other.pos_embed

    assert torch.equal(stated((8, 32), [8, 32]), model.pos_embed)
    assert torch.equal(
        stated((16, 16), (8, 32)), resize_pos_embed(model.pos_embed, (8, 32), (16, 16), None)
    )
    with pytest.raises(CheckpointError, match='silent.pth: .*256 patches, not for .* 8 × 8'):
        stated((8, 8), (8, 8))
    for grid in ((8,), 16, (8.0, 32), (0, 4)):
        with pytest.raises(ValueError, match=r'grid must be \(rows, columns\)'):
            stated((8, 32), grid)


def test_a_grid_that_is_no_square_must_be_stated(tmp_path):
    torch.save({'model': dict(held_by((3, 5)).state_dict())}, tmp_path / 'silent.pth')
    with pytest.raises(CheckpointError, match='15 patches, which is neither a square nor .* 4 × 4'):
        held_by((4, 4), checkpoint=tmp_path / 'silent.pth')
    assert held_by((3, 5), checkpoint=tmp_path / 'silent.pth').grid == (3, 5)


def test_the_place_of_the_class_token_is_stored_and_read(tmp_path):
    source = build(cls_token='head')
    torch.save({'model': source.state_dict()}, tmp_path / 'head.pth')
    rows = source.pos_embed
    dense = build(tmp_path / 'head.pth', cls_token=None)
    assert torch.equal(dense.pos_embed, rows[:, 1:])
    middle = build(tmp_path / 'head.pth', cls_token='middle')
    assert torch.equal(middle.pos_embed[:, 98], rows[:, 0])
    assert torch.equal(middle.pos_embed[:, :98], rows[:, 1:99])


@pytest.mark.parametrize('bands', [1, 4, 12])
def test_bands_are_fitted_on_request_only(official, bands, tmp_path, log):
    init_cfg = dict(type='Pretrained', checkpoint=str(official))
    image = torch.rand(1, 1, 56, 56)
    rgb = build(official, cls_token=None)

    def fitted(how=None):
        model = build(cls_token=None, in_channels=bands)
        model.init_cfg = {**init_cfg, 'bands': how} if how else init_cfg
        model._is_init = False
        model.init_weights()
        return model

    with pytest.raises(CheckpointError, match=r"of another shape: patch_embed.*bands='mean' or"):
        fitted()
    grey = image.expand(1, bands, 56, 56)
    assert torch.allclose(fitted('mean')(grey)[0], rgb(image.expand(1, 3, 56, 56))[0], atol=1e-5)
    assert f'bands 3 → {bands} (mean)' in log[-1]
    if bands < 3:
        with pytest.raises(
            CheckpointError, match="bands='zero' adds bands, but 1 are fewer than 3"
        ):
            fitted('zero')
        return
    picture = torch.rand(1, bands, 56, 56)
    assert torch.allclose(fitted('zero')(picture)[0], rgb(picture[:, :3])[0], atol=1e-6)
    with pytest.raises(ValueError, match="bands must be 'mean', 'zero' or None, got 'repeat'"):
        fitted('repeat')


@pytest.mark.parametrize(
    'rename',
    [
        'module.{}',
        '_orig_mod.{}',
        'module._orig_mod.{}',
        '_orig_mod.module.{}',
        'model.{}',
        'encoder.backbone._orig_mod.{}',
    ],
)
def test_wrappers_and_prefixes_of_other_scripts_are_seen_through(official, rename, tmp_path):
    weights = torch.load(official, weights_only=True)['model']
    entries = {rename.format(key): value for key, value in weights.items()}
    entries['decoder.weight'] = torch.rand(1)
    if rename in ('module.{}', '_orig_mod.{}', 'module._orig_mod.{}', '_orig_mod.module.{}'):
        del entries['decoder.weight']
    torch.save({'state_dict': entries}, tmp_path / 'wrapped.pth')
    assert torch.equal(
        build(tmp_path / 'wrapped.pth', cls_token='middle').cls_token, weights['cls_token']
    )


def test_several_models_in_a_file_must_be_chosen_from(tmp_path):
    student, teacher = build(), build()
    entries = {f'student.{key}': value for key, value in student.state_dict().items()}
    entries |= {f'teacher.{key}': value for key, value in teacher.state_dict().items()}
    torch.save({'model': entries}, tmp_path / 'two.pth')
    with pytest.raises(CheckpointError, match=r'student\.\*, teacher\.\*: prefix=.* chooses'):
        build(tmp_path / 'two.pth')
    model = build()
    load_pretrained(model, str(tmp_path / 'two.pth'), prefix='teacher')
    assert torch.equal(model.cls_token, teacher.cls_token)
    torch.save({'model': {'module.x': torch.rand(1), 'x': torch.rand(1)}}, tmp_path / 'twice.pth')
    with pytest.raises(CheckpointError, match='holds x more than once'):
        build(tmp_path / 'twice.pth')


@pytest.mark.parametrize('key', ['model_ema', 'state_dict_ema'])
def test_averages_of_other_scripts_are_taken_on_request(key, tmp_path, log):
    trained, averaged = build(), build()
    torch.save({'model': trained.state_dict(), key: averaged.state_dict()}, tmp_path / 'ema.pth')
    assert torch.equal(build(tmp_path / 'ema.pth').cls_token, trained.cls_token)
    assert "weights='model', the file also holds weights='ema'" in log[-1]
    model = build()
    load_pretrained(model, str(tmp_path / 'ema.pth'), weights='ema')
    assert torch.equal(model.cls_token, averaged.cls_token)
    torch.save({'model': trained.state_dict()}, tmp_path / 'plain.pth')
    with pytest.raises(CheckpointError, match="plain.pth holds no weights='ema', only 'model'"):
        load_pretrained(model, str(tmp_path / 'plain.pth'), weights='ema')
    with pytest.raises(ValueError, match="weights must be 'model', 'ema' or None, got 'both'"):
        load_pretrained(model, str(tmp_path / 'ema.pth'), weights='both')


def test_what_is_no_checkpoint_is_said(tmp_path):
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(CheckpointError, match='list.pth holds a list, not a checkpoint'):
        build(tmp_path / 'list.pth')
    torch.save({'epoch': 1, 'net': {}}, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match='other.pth holds no VisionMamba weights'):
        build(tmp_path / 'other.pth')
