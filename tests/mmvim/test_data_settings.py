import pytest
from mmengine.config import Config

from mmvim.utils.data import check_data, use_checked_coco
from mmvim.utils.errors import UserError


def config(**dataset) -> Config:
    return Config(dict(train_dataloader=dict(dataset=dict(type='Any', **dataset))))


@pytest.fixture
def root(tmp_path):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'ann.json').write_text('{}')
    (tmp_path / 'empty.txt').touch()
    return str(tmp_path)


def test_what_exists_passes(root):
    loader = 'train_dataloader'
    prefix = dict(img_path='images')
    check_data(config(data_root=root, data_prefix=prefix, ann_file='ann.json'), loader)
    check_data(config(data_root=root, data_prefix='images'), loader)
    check_data(config(data_root=root, data_prefix=dict(img='images/'), ann_file=''), loader)
    check_data(config(ann_file=f'{root}/ann.json', data_prefix=dict(img=f'{root}/images')), loader)
    check_data(Config(dict(train_dataloader=None)), loader, 'val_dataloader')


STORAGE = dict(backend='zip', archive='data.zip')
READS_STORAGE = [dict(type='LoadImageFromFile', backend_args=STORAGE)]


@pytest.mark.parametrize(
    'dataset',
    [
        dict(data_root='s3://bucket/ade', ann_file='ann.json'),
        dict(ann_file='s3://bucket/ann.json', data_prefix=dict(img='s3://bucket/images')),
        dict(data_root='{}', ann_file='ann.json', data_prefix=dict(img='http://host/images')),
        dict(data_root='in/storage', ann_file='ann.txt', backend_args=STORAGE),
        dict(ann_file='{}/ann.json', data_prefix='in/storage', pipeline=READS_STORAGE),
    ],
)
def test_what_a_storage_backend_serves_is_not_looked_for(root, dataset):
    dataset = {k: v.format(root) if isinstance(v, str) else v for k, v in dataset.items()}
    check_data(config(**dataset), 'train_dataloader')


def test_the_annotation_file_of_stored_pictures_is_looked_for(root):
    cfg = config(ann_file=f'{root}/no.json', data_prefix='in/storage', pipeline=READS_STORAGE)
    with pytest.raises(UserError, match='ann_file: .*no.json does not exist'):
        check_data(cfg, 'train_dataloader')


@pytest.mark.parametrize(
    ('dataset', 'message'),
    [
        (dict(ann_file='empty.txt'), r'dataset\.ann_file: .*empty.txt is empty'),
        (
            dict(ann_file=['a.json', 'b.json']),
            r'ann_file must be one file, got 2: a.json, b.json.*Con',
        ),
        (dict(metainfo=dict(classes='x')), r"metainfo.classes is the string 'x'.*\('x',\)"),
        (dict(classes='x'), r"dataset.classes is the string 'x'.*\('x',\)"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(root, dataset, message):
    with pytest.raises(UserError, match=message):
        check_data(config(data_root=root, **dataset), 'train_dataloader')


def test_class_names_may_come_from_a_file(tmp_path):
    (tmp_path / 'names.txt').write_text('disc\nring\n')
    for classes in (str(tmp_path / 'names.txt'), 's3://bucket/names.txt', ['x'], None):
        check_data(config(metainfo=dict(classes=classes)), 'train_dataloader')


@pytest.mark.parametrize(
    ('dataset', 'setting'),
    [
        (dict(data_root='{}/no'), 'data_root'),
        (dict(data_root='{}', ann_file='no.json'), 'ann_file'),
        (dict(data_root='{}', data_prefix=dict(seg_map_path='no')), 'data_prefix.seg_map_path'),
        (dict(data_root='{}', data_prefix='no'), 'data_prefix'),
        (dict(data_root='{}', ann_file='no', backend_args=dict(backend='local')), 'ann_file'),
    ],
)
def test_what_is_missing_is_named(root, dataset, setting):
    dataset['data_root'] = dataset['data_root'].format(root)
    with pytest.raises(UserError, match=rf'train_dataloader\.dataset\.{setting}: .*no.* not exist'):
        check_data(config(**dataset), 'train_dataloader')


@pytest.mark.parametrize(
    'form',
    [
        lambda metric: metric,
        lambda metric: [dict(type='Other'), metric],
        lambda metric: dict(type='Evaluator', metrics=[dict(type='Other'), metric]),
        lambda metric: dict(metrics=metric),
    ],
)
def test_the_annotations_of_an_evaluator_are_looked_for(root, form):
    def check(**metric):
        evaluator = form(dict(type='CocoMetric', **metric))
        check_data(Config(dict(val_dataloader=None, val_evaluator=evaluator)), 'val_dataloader')

    with pytest.raises(UserError, match=r'val_evaluator\.ann_file: .*no.json does not exist'):
        check(ann_file=f'{root}/no.json')
    with pytest.raises(UserError, match=r'val_evaluator\.ann_file must be one file, got 2'):
        check(ann_file=['a.json', 'b.json'])
    check(ann_file=f'{root}/ann.json')
    check(ann_file=f'{root}/no.json', backend_args=STORAGE)
    check(ann_file='s3://bucket/ann.json')
    check()


def test_data_sets_inside_of_wrappers_are_found(root):
    missing = dict(type='Any', data_root='nowhere')
    present = dict(type='Any', data_root=root)
    for wrapped in (dict(dataset=missing), dict(datasets=[present, missing])):
        cfg = Config(dict(train_dataloader=dict(dataset=dict(type='Wrapper', **wrapped))))
        with pytest.raises(UserError, match='nowhere does not exist'):
            check_data(cfg, 'train_dataloader')


def test_coco_is_read_by_this_projects_classes_in_every_split():
    from mmdet.datasets import CocoDataset

    stock = dict(type='CocoDataset', data_root='x')
    cfg = Config(
        dict(
            default_scope='mmdet',
            train_dataloader=dict(dataset=dict(type='RepeatDataset', dataset=stock)),
            val_dataloader=dict(dataset=dict(type=CocoDataset)),
            val_evaluator=[dict(type='Other'), dict(type='mmdet.CocoMetric')],
            test_dataloader=dict(dataset=dict(type='MyDataset')),
            test_evaluator=dict(metrics=dict(type='CocoMetric')),
            custom_imports=dict(imports='mmvim'),
        )
    )
    use_checked_coco(cfg)
    assert cfg.train_dataloader.dataset.dataset == dict(stock, type='mmdet.CheckedCocoDataset')
    assert cfg.val_dataloader.dataset.type == 'mmdet.CheckedCocoDataset'
    assert [metric.type for metric in cfg.val_evaluator] == ['Other', 'mmdet.CheckedCocoMetric']
    assert cfg.test_dataloader.dataset.type == 'MyDataset'
    assert cfg.test_evaluator.metrics.type == 'mmdet.CheckedCocoMetric'
    assert cfg.custom_imports.imports == ['mmvim', 'mmvim.datasets']


def test_other_packages_coco_is_left_alone():
    cfg = Config(dict(default_scope='mmpose', val_evaluator=dict(type='CocoMetric')))
    use_checked_coco(cfg)
    assert cfg.val_evaluator.type == 'CocoMetric' and 'custom_imports' not in cfg
