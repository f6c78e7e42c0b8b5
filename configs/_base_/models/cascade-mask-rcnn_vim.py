# Cascade Mask R-CNN in ViTDet's style on a Vision Mamba backbone: the last map, of stride 16, becomes
# a pyramid of strides 4 to 64; two convolutions in the RPN, four and one linear layer in the box
# heads, layer norm over the channels throughout. The sequence is plain: no windows, and 64 x 64
# patches at 1024 x 1024. Sizes are those of Vim-Ti; other configs override them.
_base_ = 'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py'
norm_cfg = dict(type='LN2d')
model = dict(
    # Jittered images are smaller or larger than this; tested images keep their aspect ratio.
    data_preprocessor=dict(
        batch_augments=[dict(type='BatchFixedSizePad', size=(1024, 1024), pad_mask=True)]),
    # ImageNet weights, official .pth or this project's:
    # --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
    backbone=dict(
        _delete_=True, type='VisionMamba', arch='tiny', img_size=1024, cls_token=None),
    neck=dict(
        _delete_=True,
        type='SimpleFeaturePyramid',
        in_channels=192,
        out_channels=256,
        num_outs=5,
        norm_cfg=norm_cfg),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=[
            dict(head, type='Shared4Conv1FCBBoxHead', conv_out_channels=256, norm_cfg=norm_cfg)
            for head in _base_.model.roi_head.bbox_head
        ],
        mask_head=dict(norm_cfg=norm_cfg)),
    # Anchors may stick out: none would be left of a thin image that jitter has made small.
    train_cfg=dict(rpn=dict(allowed_border=-1), rpn_proposal=dict(max_per_img=1000)))
