"""The architectures of the zoo sweep: small variants with random weights, and their inputs.

An entry is ``source:name``. `build` makes the network with weights that look trained, so that no
error can hide behind a branch that is initialised to zero.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from own_networks import OWN
from torch import Tensor, nn
from transformer_models import CONFIGURATIONS, from_transformers

__all__ = ["ARCHITECTURES", "build", "import_torchvision"]

_LIBRARIES: list[torch.library.Library] = []  # a schema lasts as long as its library

TORCHVISION = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t
mnasnet0_5 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18
resnet34 resnet50 resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 squeezenet1_0 squeezenet1_1
swin_t swin_v2_t vgg11 vgg11_bn vgg16 vit_b_32 wide_resnet50_2 fcn_resnet50 deeplabv3_resnet50
deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large r3d_18 mc3_18 r2plus1d_18 s3d mvit_v2_s
swin3d_t raft_small
""".split()
BACKBONES = """
fasterrcnn_resnet50_fpn fasterrcnn_mobilenet_v3_large_fpn retinanet_resnet50_fpn fcos_resnet50_fpn
ssd300_vgg16 ssdlite320_mobilenet_v3_large maskrcnn_resnet50_fpn_v2
""".split()
TIMM = """
resnet18 resnet26 resnet26d resnet26t resnet50_gn seresnet50 ecaresnet26t resnext26ts
seresnext26d_32x4d
resnetv2_50 resnetv2_50x1_bit resnetv2_18 wide_resnet50_2 skresnet18 resnest14d res2net50_26w_4s
legacy_seresnet18 tresnet_m
densenet121 densenetblur121d rdnet_tiny vgg11 vgg13_bn
mobilenetv2_050 mobilenetv3_small_050 mobilenetv3_large_075 mobilenetv4_conv_small
mobilenetv4_hybrid_medium mnasnet_small fbnetc_100 spnasnet_100 mixnet_s lcnet_050 tinynet_e
fbnetv3_b ghostnet_050 ghostnetv2_100 ghostnetv3_100 hardcorenas_a
semnasnet_075 efficientnet_b0 efficientnet_lite0 efficientnetv2_rw_t efficientnet_es
tf_efficientnetv2_b0 efficientnet_b0_gn rexnet_100 edgenext_xx_small
convnext_atto convnext_tiny convnextv2_atto convnext_atto_ols convmixer_768_32 inception_next_atto
regnetx_002 regnety_002 regnetz_b16 regnetv_040 gernet_s repvgg_a0 repvgg_b0 mobileone_s0
repvit_m0_9 repghostnet_050 starnet_s050 fasternet_t0
hrnet_w18_small dla34 dla46_c dla60_res2net dpn48b dpn68 nf_resnet26 nf_regnet_b0 nfnet_l0
dm_nfnet_f0 eca_nfnet_l0 hgnetv2_b0 hgnet_tiny vovnet39a ese_vovnet19b_dw eca_vovnet39b
cspdarknet53 cspresnet50 cs3darknet_s cspresnext50 darknet53 selecsls42b legacy_xception xception41
inception_v3 inception_v4 inception_resnet_v2 nasnetalarge pnasnet5large
botnet26t_256 eca_botnext26ts_256 halonet26t lambda_resnet26t gcresnet33ts bat_resnext26ts
vit_tiny_patch16_224 vit_small_patch32_224 vit_tiny_r_s16_p8_224 vit_relpos_small_patch16_224
vit_small_patch16_18x2_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224
deit3_small_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224 cait_xxs24_224 convit_tiny
crossvit_9_240 pit_ti_224 pit_s_distilled_224 tnt_s_patch16_224 xcit_nano_12_p16_224
xcit_tiny_12_p16_224 levit_128s levit_conv_128s coat_lite_tiny coat_tiny twins_pcpvt_small
twins_svt_small pvt_v2_b0 mvitv2_tiny nest_tiny volo_d1_224 visformer_tiny
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 swin_s3_tiny_224 davit_tiny
focalnet_tiny_srf gcvit_xxtiny maxvit_rmlp_pico_rw_256 maxvit_nano_rw_256 coatnet_pico_rw_224
coatnet_nano_rw_224 coatnext_nano_rw_224 hiera_tiny_224
mixer_s32_224 mixer_s16_224 gmixer_12_224 gmlp_ti16_224 gmlp_s16_224 resmlp_12_224 sequencer2d_s
poolformer_s12 poolformerv2_s12 convformer_s18 caformer_s18 efficientformer_l1
efficientformerv2_s0 efficientvit_b0 efficientvit_m0 mobilevit_xxs mobilevitv2_050 fastvit_t8
nextvit_small tiny_vit_5m_224 swiftformer_xs mambaout_femto shvit_s1 vitamin_small_224
efficientvim_m1
""".split()

ARCHITECTURES: tuple[str, ...] = (
    *(f"own:{name}" for name in OWN),
    *(f"torchvision:{name}" for name in TORCHVISION),
    *(f"backbone:{name}" for name in BACKBONES),
    *(f"hf:{name}" for name in CONFIGURATIONS),
    *(f"timm:{name}" for name in TIMM),
)


def import_torchvision() -> None:
    """Import torchvision where it is installed, also where its operators do not load beside torch.

    Then the two operators that its import looks for are declared first; nothing here calls them.
    Transformers imports it too.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
        importlib.import_module("torchvision")


def build(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """Make a network in evaluation mode, and inputs that it takes.

    Args:
        name: an entry of ARCHITECTURES.
        seed: of the weights and the inputs.
    """
    source, _, rest = name.partition(":")
    if source in ("torchvision", "backbone", "timm"):
        import_torchvision()
    torch.manual_seed(seed)
    model, shapes = SOURCES[source](rest)
    randomise(model, seed)
    return model.eval(), _inputs(model, shapes, seed)


def randomise(model: nn.Module, seed: int) -> None:
    """Let weights look trained: statistics at random, and nothing that is constant or nearly so."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        with torch.no_grad():
            if not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.5 * torch.rand(tensor.shape, generator=generator))
            elif name.endswith("running_mean"):
                tensor.copy_(0.2 * noise(tensor))
            elif isinstance(tensor, nn.Parameter) and _is_nearly_constant(tensor):
                tensor.add_(0.1 * noise(tensor))


def _is_nearly_constant(tensor: Tensor) -> bool:
    return float(tensor.max() - tensor.min()) < 1e-3


def _inputs(model: nn.Module, shapes: list[Any], seed: int) -> Any:
    """Draw inputs of the first shape that the network takes; what is no shape is given as it is."""
    generator = torch.Generator().manual_seed(seed)
    error: Exception | None = None
    for shape in shapes:
        is_shape = isinstance(shape, tuple) and isinstance(shape[0], int)
        inputs = torch.randn(shape, generator=generator) if is_shape else shape
        args = (inputs,) if isinstance(inputs, Tensor) else inputs
        try:
            with torch.no_grad():
                model(**args) if isinstance(args, Mapping) else model(*args)
            return inputs
        except (RuntimeError, ValueError, AssertionError) as refusal:
            error = refusal
    raise RuntimeError(f"takes none of the inputs {shapes}: {error}")


def _images(*sizes: int) -> list[Any]:
    return [(2, 3, size, size) for size in sizes]


def _from_torchvision(name: str) -> tuple[nn.Module, list[Any]]:
    from torchvision import models

    plain: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        plain |= {"init_weights": False, "aux_logits": False}  # heads that only training runs
    if name.startswith(("deeplab", "fcn", "lraspp")):
        plain["weights_backbone"] = None
    model = models.get_model(name, **plain)
    if name.endswith(("3d_18", "s3d", "swin3d_t", "2plus1d_18", "mc3_18")):
        return model, [(1, 3, 8, 64, 64), (1, 3, 16, 64, 64), (1, 3, 16, 224, 224)]
    if name.startswith("mvit"):
        return model, [(1, 3, 16, 224, 224)]
    if name.startswith("raft"):
        pair = tuple(torch.rand(1, 3, 128, 128) for _ in range(2))
        return model, [pair]
    return model, _images(64, 128, 224)


def _from_detection(name: str) -> tuple[nn.Module, list[Any]]:
    from torchvision import models

    model = models.get_model(name, weights=None, weights_backbone=None)
    return model.backbone, _images(64, 320)


def _from_timm(name: str) -> tuple[nn.Module, list[Any]]:
    import timm

    model = timm.create_model(name, pretrained=False)
    return model, _images(64, 128, int(model.default_cfg["input_size"][-1]))


SOURCES = {
    "own": lambda name: OWN[name](),
    "hf": from_transformers,
    "torchvision": _from_torchvision,
    "backbone": _from_detection,
    "timm": _from_timm,
}
