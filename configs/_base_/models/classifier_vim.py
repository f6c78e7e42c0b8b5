# A linear classifier on Vim's class token. Sizes are those of Vim-Ti; the others override in_channels.
model = dict(
    type='ImageClassifier',
    # A classifier's weights, official .pth or this project's: --cfg-options load_from=FILE
    backbone=dict(
        type='VisionMamba',
        arch='tiny',
        img_size=224,
        cls_token='middle',
        out_type='cls_token',
        drop_path_rate=0.1),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=192,
        topk=(1, 5),
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')),
    train_cfg=dict(augments=dict(type='Mixup', alpha=0.8)))
