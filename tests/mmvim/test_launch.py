import pytest
from mmengine.config import Config

from mmvim.utils.launch import UserError, check_data


def config(**dataset) -> Config:
    return Config(dict(train_dataloader=dict(dataset=dict(type='Any', **dataset))))


@pytest.fixture
def root(tmp_path):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'ann.json').touch()
    return str(tmp_path)


def test_what_exists_passes(root):
    loader = 'train_dataloader'
    prefix = dict(img_path='images')
    check_data(config(data_root=root, data_prefix=prefix, ann_file='ann.json'), loader)
    check_data(config(data_root=root, data_prefix='images'), loader)
    check_data(config(data_root=root, data_prefix=dict(img='images/'), ann_file=''), loader)
    check_data(config(ann_file=f'{root}/ann.json', data_prefix=dict(img=f'{root}/images')), loader)
    check_data(config(data_root='s3://bucket/ade', ann_file='ann.json'), loader)
    check_data(Config(dict(train_dataloader=None)), loader, 'val_dataloader')


@pytest.mark.parametrize(
    ('dataset', 'setting'),
    [
        (dict(data_root='{}/no'), 'data_root'),
        (dict(data_root='{}', ann_file='no.json'), 'ann_file'),
        (dict(data_root='{}', data_prefix=dict(seg_map_path='no')), 'data_prefix.seg_map_path'),
        (dict(data_root='{}', data_prefix='no'), 'data_prefix'),
    ],
)
def test_what_is_missing_is_named(root, dataset, setting):
    dataset['data_root'] = dataset['data_root'].format(root)
    with pytest.raises(UserError, match=rf'train_dataloader\.dataset\.{setting}: .*no.* not exist'):
        check_data(config(**dataset), 'train_dataloader')


def test_the_annotations_of_an_evaluator_are_looked_for(root):
    metric = dict(type='CocoMetric', ann_file=f'{root}/no.json')
    for evaluator in (metric, [dict(type='Other'), metric]):
        cfg = Config(dict(val_dataloader=None, val_evaluator=evaluator))
        with pytest.raises(UserError, match=r'val_evaluator\.ann_file: .*no.json does not exist'):
            check_data(cfg, 'train_dataloader', 'val_dataloader')
    metric['ann_file'] = f'{root}/ann.json'
    check_data(Config(dict(val_evaluator=metric)), 'val_dataloader')


def test_data_sets_inside_of_wrappers_are_found(root):
    missing = dict(type='Any', data_root='nowhere')
    present = dict(type='Any', data_root=root)
    for wrapped in (dict(dataset=missing), dict(datasets=[present, missing])):
        cfg = Config(dict(train_dataloader=dict(dataset=dict(type='Wrapper', **wrapped))))
        with pytest.raises(UserError, match='nowhere does not exist'):
            check_data(cfg, 'train_dataloader')
