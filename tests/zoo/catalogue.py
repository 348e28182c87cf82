"""What is tapped in networks of torchvision, timm and transformers, written down by hand.

A line names a network, the image size (height x width) and the layers that make its logits. Below
it stand its stages: their layout, height x width + prefix tokens, and the taps in the order in
which they run; `{0-2}` stands for 0, 1, 2 and `{a,b}` for a, b. `refused` stands where the taps
have to be named. transformers' networks have the small sizes of `networks.SMALL`.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

TABLE = """
# Residual blocks, channels first
torchvision:wide_resnet50_2 64x64 fc
    BCHW 16x16 layer1.{0-2}
    BCHW 8x8 layer2.{0-3}
    BCHW 4x4 layer3.{0-5}
    BCHW 2x2 layer4.{0-2}
torchvision:regnet_y_400mf 64x64 fc
    BCHW 16x16 trunk_output.block1.block1-0
    BCHW 8x8 trunk_output.block2.block2-{0-2}
    BCHW 4x4 trunk_output.block3.block3-{0-5}
    BCHW 2x2 trunk_output.block4.block4-{0-5}
torchvision:convnext_tiny 64x64 classifier.2
    BCHW 16x16 features.1.{0-2}
    BCHW 8x8 features.3.{0-2}
    BCHW 4x4 features.5.{0-8}
    BCHW 2x2 features.7.{0-2}
timm:resnet26 64x96 fc
    BCHW 16x24 layer1.{0,1}
    BCHW 8x12 layer2.{0,1}
    BCHW 4x6 layer3.{0,1}
    BCHW 2x3 layer4.{0,1}
timm:res2net50_26w_4s 64x64 fc
    BCHW 16x16 layer1.{0-2}
    BCHW 8x8 layer2.{0-3}
    BCHW 4x4 layer3.{0-5}
    BCHW 2x2 layer4.{0-2}
timm:resnest14d 64x64 fc
    BCHW 16x16 layer1.0
    BCHW 8x8 layer2.0
    BCHW 4x4 layer3.0
    BCHW 2x2 layer4.0
timm:tresnet_m 64x64 head.fc
    BCHW 16x16 body.layer1.{0-2}
    BCHW 8x8 body.layer2.{0-3}
    BCHW 4x4 body.layer3.{0-10}
    BCHW 2x2 body.layer4.{0-2}
timm:regnetz_005 64x64 head.fc
    BCHW 16x16 s1.b1
    BCHW 8x8 s2.b{1-4}
    BCHW 4x4 s3.b{1-9}
    BCHW 2x2 s4.b{1-7}
timm:eca_nfnet_l0 64x64 head.fc
    BCHW 16x16 stages.0.0
    BCHW 8x8 stages.1.{0,1}
    BCHW 4x4 stages.2.{0-5}
    BCHW 2x2 stages.3.{0-2}
timm:convnextv2_atto 64x64 head.fc
    BCHW 16x16 stages.0.blocks.{0,1}
    BCHW 8x8 stages.1.blocks.{0,1}
    BCHW 4x4 stages.2.blocks.{0-5}
    BCHW 2x2 stages.3.blocks.{0,1}
timm:inception_next_atto 64x64 head.fc2
    BCHW 16x16 stages.0.blocks.{0,1}
    BCHW 8x8 stages.1.blocks.{0,1}
    BCHW 4x4 stages.2.blocks.{0-5}
    BCHW 2x2 stages.3.blocks.{0,1}
timm:poolformer_s12 64x64 head.fc
    BCHW 16x16 stages.0.blocks.{0,1}
    BCHW 8x8 stages.1.blocks.{0,1}
    BCHW 4x4 stages.2.blocks.{0-5}
    BCHW 2x2 stages.3.blocks.{0,1}
timm:starnet_s1 64x64 head
    BCHW 16x16 stages.0.{1,2}
    BCHW 8x8 stages.1.{1,2}
    BCHW 4x4 stages.2.{1-8}
    BCHW 2x2 stages.3.{1-3}
timm:focalnet_tiny_srf 64x64 head.fc
    BCHW 16x16 layers.0.blocks.{0,1}
    BCHW 8x8 layers.1.blocks.{0,1}
    BCHW 4x4 layers.2.blocks.{0-5}
    BCHW 2x2 layers.3.blocks.{0,1}
timm:edgenext_xx_small 64x64 head.fc
    BCHW 16x16 stages.0.blocks.{0,1}
    BCHW 8x8 stages.1.blocks.{0,1}
    BCHW 4x4 stages.2.blocks.{0-5}
    BCHW 2x2 stages.3.blocks.{0,1}
timm:visformer_tiny 64x64 head
    BCHW 8x8 stage1.{0-6}
    BCHW 4x4 stage2.{0-3}
    BCHW 2x2 stage3.{0-3}
timm:xception41 96x96 head.fc
    BCHW 24x24 blocks.0
    BCHW 12x12 blocks.1
    BCHW 6x6 blocks.{2-10}
    BCHW 3x3 blocks.{11,12}
timm:convmixer_768_32 32x32 head
    BCHW 4x4 blocks.{0-31}.0
transformers:ResNetForImageClassification 64x64 classifier.1
    BCHW 16x16 resnet.encoder.stages.0.layers.{0,1}
    BCHW 8x8 resnet.encoder.stages.1.layers.{0,1}
    BCHW 4x4 resnet.encoder.stages.2.layers.{0,1}
    BCHW 2x2 resnet.encoder.stages.3.layers.{0,1}
transformers:RegNetForImageClassification 64x64 classifier.1
    BCHW 16x16 regnet.encoder.stages.0.layers.{0,1}
    BCHW 8x8 regnet.encoder.stages.1.layers.{0,1}
    BCHW 4x4 regnet.encoder.stages.2.layers.{0,1}
    BCHW 2x2 regnet.encoder.stages.3.layers.{0,1}
transformers:BitForImageClassification 64x64 classifier.1
    BCHW 16x16 bit.encoder.stages.0.layers.{0,1}
    BCHW 8x8 bit.encoder.stages.1.layers.{0,1}
    BCHW 4x4 bit.encoder.stages.2.layers.{0,1}
    BCHW 2x2 bit.encoder.stages.3.layers.{0,1}
transformers:PoolFormerForImageClassification 64x64 classifier
    BCHW 16x16 poolformer.encoder.block.0.{0,1}
    BCHW 8x8 poolformer.encoder.block.1.{0,1}
    BCHW 4x4 poolformer.encoder.block.2.{0-2}
    BCHW 2x2 poolformer.encoder.block.3.{0,1}

# As many channels as rows and columns
transformers:ConvNextForImageClassification 64x64 classifier
    BCHW 16x16 convnext.encoder.stages.0.layers.{0,1}
    BCHW 8x8 convnext.encoder.stages.1.layers.{0,1}
    BCHW 4x4 convnext.encoder.stages.2.layers.{0-2}
    BCHW 2x2 convnext.encoder.stages.3.layers.{0,1}
timm:mambaout_femto 192x192 head.fc
    BHWC 48x48 stages.0.blocks.{0-2}
    BHWC 24x24 stages.1.blocks.{0-2}
    BHWC 12x12 stages.2.blocks.{0-8}
    BHWC 6x6 stages.3.blocks.{0-2}

# Inverted residual blocks, some of them without a shortcut
torchvision:mobilenet_v2 96x96 classifier.1
    BCHW 48x48 features.1
    BCHW 24x24 features.{2,3}
    BCHW 12x12 features.{4-6}
    BCHW 6x6 features.{7-13}
    BCHW 3x3 features.{14-17}
torchvision:mobilenet_v3_small 96x96 classifier.3
    BCHW 24x24 features.1
    BCHW 12x12 features.{2,3}
    BCHW 6x6 features.{4-8}
    BCHW 3x3 features.{9-11}
torchvision:mnasnet0_5 64x64 classifier.1
    BCHW 16x16 layers.8.{0-2}
    BCHW 8x8 layers.9.{0-2}
    BCHW 4x4 layers.10.{0-2} layers.11.{0,1}
    BCHW 2x2 layers.12.{0-3} layers.13.0
torchvision:efficientnet_b0 64x64 classifier.1
    BCHW 32x32 features.1.0
    BCHW 16x16 features.2.{0,1}
    BCHW 8x8 features.3.{0,1}
    BCHW 4x4 features.4.{0-2} features.5.{0-2}
    BCHW 2x2 features.6.{0-3} features.7.0
timm:mobilenetv4_conv_small 96x96 classifier
    BCHW 6x6 blocks.2.{0-5}
    BCHW 3x3 blocks.3.{0-5}
timm:ghostnet_100 96x96 classifier
    BCHW 48x48 blocks.0.0
    BCHW 24x24 blocks.1.0 blocks.2.0
    BCHW 12x12 blocks.3.0 blocks.4.0
    BCHW 6x6 blocks.5.0 blocks.6.{0-4}
    BCHW 3x3 blocks.7.0 blocks.8.{0-3}
timm:mixnet_s 96x96 classifier
    BCHW 48x48 blocks.0.0
    BCHW 24x24 blocks.1.{0,1}
    BCHW 12x12 blocks.2.{0-3}
    BCHW 6x6 blocks.3.{0-2} blocks.4.{0-2}
    BCHW 3x3 blocks.5.{0-2}
timm:rexnet_100 96x96 head.fc
    BCHW 48x48 features.0
    BCHW 24x24 features.{1,2}
    BCHW 12x12 features.{3,4}
    BCHW 6x6 features.{5-10}
    BCHW 3x3 features.{11-15}
transformers:MobileNetV2ForImageClassification 64x64 classifier
    BCHW 16x16 mobilenet_v2.layer.{0,1}
    BCHW 8x8 mobilenet_v2.layer.{2-4}
    BCHW 4x4 mobilenet_v2.layer.{5-11}
    BCHW 2x2 mobilenet_v2.layer.{12-15}

# Concatenated branches
torchvision:densenet121 64x64 classifier
    BCHW 16x16 features.denseblock1
    BCHW 8x8 features.denseblock2
    BCHW 4x4 features.denseblock3
    BCHW 2x2 features.denseblock4
torchvision:shufflenet_v2_x0_5 64x64 fc
    BCHW 8x8 stage2.{0-3}
    BCHW 4x4 stage3.{0-7}
    BCHW 2x2 stage4.{0-3}
torchvision:googlenet 64x64 fc
    BCHW 8x8 inception3{a,b}
    BCHW 4x4 inception4{a,b,c,d,e}
    BCHW 2x2 inception5{a,b}
torchvision:inception_v3 128x128 fc
    BCHW 13x13 Mixed_5{b,c,d}
    BCHW 6x6 Mixed_6{a,b,c,d,e}
    BCHW 2x2 Mixed_7{a,b,c}
timm:cspresnet50 64x64 head.fc
    BCHW 16x16 stages.0
    BCHW 8x8 stages.1
    BCHW 4x4 stages.2
    BCHW 2x2 stages.3
timm:ese_vovnet19b_dw 64x64 head.fc
    BCHW 16x16 stages.0.blocks.0
    BCHW 8x8 stages.1.blocks.0
    BCHW 4x4 stages.2.blocks.0
    BCHW 2x2 stages.3.blocks.0

# Blocks that pass on lists of feature maps
timm:selecsls42b 64x64 fc
    BCHW 16x16 features.{0,1}
    BCHW 8x8 features.{2,3}
    BCHW 4x4 features.{4,5}

# A convolution as head
torchvision:squeezenet1_1 64x64 classifier.1
    BCHW 15x15 features.{3,4}
    BCHW 7x7 features.{6,7}
    BCHW 3x3 features.{9-12}
timm:dla34 64x64 fc
    BCHW 16x16 level2
    BCHW 8x8 level3
    BCHW 4x4 level4
    BCHW 2x2 level5

# No branches: the last module at each resolution
torchvision:alexnet 224x224 classifier.6
    BCHW 55x55 features.1
    BCHW 27x27 features.4
    BCHW 13x13 features.11
    BCHW 6x6 avgpool
timm:lcnet_050 64x64 classifier
    BCHW 32x32 blocks.0.0.bn2.act
    BCHW 16x16 blocks.1.1.bn2.act
    BCHW 8x8 blocks.2.1.bn2.act
    BCHW 4x4 blocks.4.3.bn2.act
    BCHW 2x2 blocks.5.1.bn2.act

# Branches that reparametrisation can merge
timm:repvgg_a0 64x64 head.fc
    BCHW 32x32 stem
    BCHW 16x16 stages.0.{0,1}
    BCHW 8x8 stages.1.{0-3}
    BCHW 4x4 stages.2.{0-13}
    BCHW 2x2 stages.3.0
timm:fastvit_t8 64x64 head.fc
    BCHW 32x32 stem.0
    BCHW 16x16 stem.{1,2} stages.0.blocks.{0,1}
    BCHW 8x8 stages.1.downsample.proj.{0,1} stages.1.blocks.{0,1}
    BCHW 4x4 stages.2.downsample.proj.{0,1} stages.2.blocks.{0-3}
    BCHW 2x2 stages.3.downsample.proj.{0,1} stages.3.blocks.{0,1} final_conv
timm:repvit_m0_9 64x64 head.head.l head.head_dist.l
    BCHW 16x16 stages.0.blocks.{0,1} stages.1.downsample.pre_block
    BCHW 8x8 stages.1.blocks.{0,1} stages.2.downsample.pre_block
    BCHW 4x4 stages.2.blocks.{0-13} stages.3.downsample.pre_block
    BCHW 2x2 stages.3.blocks.{0,1}

# Channels last
torchvision:swin_t 64x96 head
    BHWC 16x24 features.1.{0,1}
    BHWC 8x12 features.3.{0,1}
    BHWC 4x6 features.5.{0-5}
    BHWC 2x3 features.7.{0,1}
timm:swinv2_tiny_window8_256 64x64 head.fc
    BHWC 16x16 layers.0.blocks.{0,1}
    BHWC 8x8 layers.1.blocks.{0,1}
    BHWC 4x4 layers.2.blocks.{0-5}
    BHWC 2x2 layers.3.blocks.{0,1}
timm:nest_tiny 64x64 head
    BHWC 16x16 levels.0.transformer_encoder.{0,1}
    BHWC 8x8 levels.1.transformer_encoder.{0,1}
    BHWC 4x4 levels.2.transformer_encoder.{0-7}

# Several layouts
timm:maxvit_rmlp_pico_rw_256 128x128 head.fc
    BCHW/BHWC/BHWC 32x32 stages.0.blocks.{0,1}.{conv,attn_block,attn_grid}
    BCHW/BHWC/BHWC 16x16 stages.1.blocks.{0,1}.{conv,attn_block,attn_grid}
    BCHW/BHWC/BHWC 8x8 stages.2.blocks.{0-4}.{conv,attn_block,attn_grid}
    BCHW/BHWC/BHWC 4x4 stages.3.blocks.{0,1}.{conv,attn_block,attn_grid}
timm:vit_small_resnet26d_224 64x64 head
    BCHW 16x16 patch_embed.backbone.layer1.{0,1}
    BCHW 8x8 patch_embed.backbone.layer2.{0,1}
    BCHW 4x4 patch_embed.backbone.layer3.{0,1}
    BCHW 2x2 patch_embed.backbone.layer4.{0,1}
    BNC 2x2+1 blocks.{0-7}
timm:caformer_s18 64x64 head.fc.fc2
    BCHW 16x16 stages.0.blocks.{0-2}
    BCHW 8x8 stages.1.blocks.{0-2}
    BNC 4x4+0 stages.2.blocks.{0-8}
    BNC 2x2+0 stages.3.blocks.{0-2}
timm:efficientformer_l1 224x224 head head_dist
    BCHW 56x56 stages.0.blocks.{0-2}
    BCHW 28x28 stages.1.blocks.{0,1}
    BCHW 14x14 stages.2.blocks.{0-5}
    BCHW 7x7 stages.3.blocks.{0-2}
    BNC 7x7+0 stages.3.blocks.4
timm:mobilevit_xxs 64x64 head.fc
    BCHW 32x32 stages.0.0
    BCHW 16x16 stages.1.{0-2}
    BCHW 8x8 stages.2.{0,1}
    BCHW 4x4 stages.3.{0,1}
    BCHW 2x2 stages.4.{0,1}

# Tokens
timm:mixer_s32_224 128x128 head
    BNC 4x4+0 blocks.{0-7}
timm:pvt_v2_b0 64x64 head
    BNC 16x16+0 stages.0.blocks.{0,1}
    BNC 8x8+0 stages.1.blocks.{0,1}
    BNC 4x4+0 stages.2.blocks.{0,1}
    BNC 2x2+0 stages.3.blocks.{0,1}
timm:twins_svt_small 64x64 head
    BNC 16x16+0 blocks.0.0 pos_block.0 blocks.0.1
    BNC 8x8+0 blocks.1.0 pos_block.1 blocks.1.1
    BNC 4x4+0 blocks.2.0 pos_block.2 blocks.2.{1-9}
    BNC 2x2+0 blocks.3.0 pos_block.3 blocks.3.{1-3}
timm:hiera_tiny_224 64x64 head.fc
    BNC 16x16+0 blocks.0
    BNC 8x8+0 blocks.{1,2}
    BNC 4x4+0 blocks.{3-9}
    BNC 2x2+0 blocks.{10,11}
timm:levit_128s 224x224 head.linear head_dist.linear
    BNC 14x14+0 stages.0.blocks.{0,1}
    BNC 7x7+0 stages.1.downsample stages.1.blocks.{0-2}
    BNC 4x4+0 stages.2.downsample stages.2.blocks.{0-3}
timm:cait_xxs24_224 96x96 head
    BNC 6x6+0 blocks.{0-23}
timm:xcit_nano_12_p16_224 96x96 head
    BNC 6x6+0 blocks.{0-11}
    BNC 6x6+1 cls_attn_blocks.{0,1}
torchvision:vit_b_16 64x64 heads.head
    BNC 4x4+1 encoder.layers.encoder_layer_{0-11}
timm:deit_tiny_patch16_224 96x64 head
    BNC 6x4+1 blocks.{0-11}
timm:pit_ti_224 224x224 head
    BNC 27x27+1 transformers.0.blocks.{0,1}
    BNC 14x14+1 transformers.1.blocks.{0-5}
    BNC 7x7+1 transformers.2.blocks.{0-3}
timm:deit_tiny_distilled_patch16_224 96x96 head head_dist
    BNC 6x6+2 blocks.{0-11}
timm:vit_small_patch14_reg4_dinov2 112x112 head
    BNC 8x8+5 blocks.{0-11}
timm:vit_small_patch16_dinov3 96x96 head
    BNC 6x6+5 blocks.{0-11}
transformers:ViTForImageClassification 64x64 classifier
    BNC 4x4+1 vit.layers.{0-3}
transformers:BeitForImageClassification 64x64 classifier
    BNC 4x4+1 beit.layers.{0-3}
transformers:DeiTForImageClassificationWithTeacher 64x64 cls_classifier distillation_classifier
    BNC 4x4+2 deit.layers.{0-3}
transformers:Dinov2ForImageClassification 112x112 classifier
    BNC 8x8+1 dinov2.encoder.layer.{0-3}
transformers:SwinForImageClassification 64x64 classifier
    BNC 16x16+0 swin.encoder.layers.0.blocks.{0,1}
    BNC 8x8+0 swin.encoder.layers.1.blocks.{0,1}
    BNC 4x4+0 swin.encoder.layers.2.blocks.{0,1}
    BNC 2x2+0 swin.encoder.layers.3.blocks.{0,1}

# Parallel trunks: the blocks before the trunk divides, if there are any
timm:hrnet_w18_small 64x64 classifier
    BCHW 16x16 layer1.0
timm:crossvit_tiny_240 240x240 head.0 head.1
    refused
timm:tnt_s_patch16_224 64x64 head
    refused
"""


class Tap(NamedTuple):
    """A module's name, its layout, and its height, width and prefix tokens."""

    name: str
    layout: str
    height: int
    width: int
    prefix: int


class Architecture(NamedTuple):
    """A network of the table; one that is refused has no taps."""

    group: str
    network: str
    image: tuple[int, int]
    head: tuple[str, ...]
    taps: tuple[Tap, ...]


def read_table(table: str) -> Iterator[Architecture]:
    """The networks of a table that is written as this module's."""
    group = ""
    for part in re.findall(r"^(?:# .+|\S.*(?:\n    .+)+)", table, re.MULTILINE):
        first, *lines = part.splitlines()
        if first.startswith("# "):
            group = first[2:]
            continue
        network, size, *head = first.split()
        taps = [tap for line in lines if line.strip() != "refused" for tap in _taps(line)]
        yield Architecture(group, network, _grid(size), tuple(head), tuple(taps))


def _taps(line: str) -> Iterator[Tap]:
    layouts, grid, *patterns = line.split()
    size, _, prefix = grid.partition("+")
    names = [name for pattern in patterns for name in _names(pattern)]
    kinds = layouts.split("/")
    for number, name in enumerate(names):
        yield Tap(name, kinds[number % len(kinds)], *_grid(size), int(prefix or 0))


def _grid(size: str) -> tuple[int, int]:
    height, width = map(int, size.split("x"))
    return height, width


def _names(pattern: str) -> Iterator[str]:
    """The names that a pattern stands for.

    >>> list(_names("layer{1,2}.{0-2}"))[1:4]
    ['layer1.1', 'layer1.2', 'layer2.0']
    """
    found = re.search(r"\{([^}]+)\}", pattern)
    if not found:
        yield pattern
        return
    first, _, last = found[1].partition("-")
    choices = map(str, range(int(first), int(last) + 1)) if last else found[1].split(",")
    for choice in choices:
        yield from _names(pattern[: found.start()] + choice + pattern[found.end() :])


CATALOGUE = list(read_table(TABLE))
