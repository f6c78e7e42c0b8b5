# UperNet on a Vision Mamba backbone: four maps of stride 16 become a pyramid of strides 4 to 32.
# Sizes are those of Vim-Ti; vim-small configs override embed_dims.
# Plain batch norm: `sync_bn` in the runtime file turns it into SyncBN when training is distributed.
norm_cfg = dict(type='BN', requires_grad=True)
embed_dims = 192
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512)),
    # ImageNet weights, official .pth or this project's:
    # --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
    backbone=dict(
        type='VisionMamba',
        arch='tiny',
        img_size=512,
        cls_token=None,
        out_indices=(5, 11, 17, 23)),
    neck=dict(type='SimpleFeaturePyramid', in_channels=embed_dims, norm_cfg=norm_cfg),
    decode_head=dict(
        type='UPerHead',
        in_channels=[embed_dims] * 4,
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=embed_dims,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=embed_dims,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
