# A Vision Mamba of a million parameters (patch 8) + a small Cascade Mask R-CNN in ViTDet's style on
# Penn-Fudan, from random weights.
_base_ = [
    '../_base_/models/cascade-mask-rcnn_vim.py', '../_base_/datasets/pennfudan_256.py',
    '../_base_/schedules/adamw_scratch_det.py', '../_base_/runtime_det.py'
]

embed_dims = 96
channels = 64
strides = [4, 8, 16, 32]
roi_extractor = dict(out_channels=channels, featmap_strides=strides)
model = dict(
    data_preprocessor=dict(batch_augments=None),
    backbone=dict(arch='nano', img_size=(256, 320), patch_size=8),
    neck=dict(in_channels=embed_dims, out_channels=channels, scales=(2, 1, 0.5), num_outs=4),
    rpn_head=dict(
        in_channels=channels, feat_channels=channels, anchor_generator=dict(strides=strides)),
    roi_head=dict(
        bbox_roi_extractor=dict(**roi_extractor, finest_scale=28),
        mask_roi_extractor=dict(**roi_extractor, finest_scale=28),
        bbox_head=[
            dict(
                head,
                in_channels=channels,
                conv_out_channels=channels,
                fc_out_channels=256,
                num_classes=1) for head in _base_.model.roi_head.bbox_head
        ],
        mask_head=dict(in_channels=channels, conv_out_channels=channels, num_classes=1)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=[
            dict(stage, sampler=dict(stage.sampler, num=64)) for stage in _base_.model.train_cfg.rcnn
        ]),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200), rcnn=dict(max_per_img=50)))

default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=50, max_keep_ckpts=1, save_best=None))
