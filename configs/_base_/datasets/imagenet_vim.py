# ImageNet-1K as the paper augments it: random crop, flip, random erasing (and mixup, in the model);
# test on the 224² centre of the image at short side 256. DeiT's recipe, which it "mainly follows",
# has RandAugment and CutMix as well; the strength of what is named is DeiT's.
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224, backend='pillow', interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(
        type='RandomErasing',
        erase_prob=0.25,
        mode='rand',
        min_area_ratio=0.02,
        max_area_ratio=1 / 3,
        fill_color=[103.53, 116.28, 123.675],
        fill_std=[57.375, 57.12, 58.395]),
    dict(type='PackInputs')
]
train_dataloader = dict(
    batch_size=128, persistent_workers=True, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=128, persistent_workers=True)
test_dataloader = dict(batch_size=128)
