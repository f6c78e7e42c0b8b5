# Schedules count iterations, not epochs.
_base_ = 'mmdet::_base_/default_runtime.py'
custom_imports = dict(imports=['mmvim', 'mmvim.datasets'])
default_hooks = dict(
    checkpoint=dict(
        type='CheckpointHook',
        by_epoch=False,
        interval=5000,
        max_keep_ckpts=3,
        save_best='coco/bbox_mAP'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False))
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=False)
custom_hooks = [dict(type='StopAtNonFiniteHook')]
