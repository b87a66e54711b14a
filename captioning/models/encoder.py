"""A torchvision CNN cut at a named node: photo -> annotation vectors a (N, L, D), Xu et al. (2015), section 3.1.1."""

import dataclasses
import functools
import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import safetensors.torch
import torch
import torchvision
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from captioning.config import EncoderConfig
from captioning.console import one_line
from captioning.model_config import Resample
from captioning.models.depthwise import quicken

_RESNETS = list_models(module=torchvision.models, include=["resnet*", "resnext*", "wide_resnet*"])

CUT_NODES: dict[str, dict[int, str]] = {
    "vgg11": {16: "features.19"},
    "vgg13": {16: "features.23"},
    "vgg16": {16: "features.29"},
    "vgg19": {16: "features.35"},
    "vgg11_bn": {16: "features.27"},
    "vgg13_bn": {16: "features.33"},
    "vgg16_bn": {16: "features.42"},
    "vgg19_bn": {16: "features.51"},
    "mobilenet_v2": {32: "features.18", 16: "features.14.conv.0"},
    **{name: {32: "layer4", 16: "layer3"} for name in _RESNETS},
}
"""Where to cut, by the stride of the feature map; the first entry is the default. VGG: the last ReLU before the last
pooling, which gives the paper's 14x14x512. A network or stride without an entry is cut at its last fitting node."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SpatialNode(NamedTuple):
    """A node of a network whose output is a feature map."""

    name: str
    channels: int
    height: int
    width: int


class Encoder(nn.Module):
    """A CNN up to one node. Pixels in, annotation vectors out; normalisation with the ImageNet statistics is inside.

    Args:
        network: the cut network, returning {"a": (N, D, h, w)}.
        grids: the sides of the input that it takes, in pixels, and (h, w) of that map at each; `image_size` and `grid`
            are the first, `sides` all.
        dim: D.
        resample: the filter by which pictures get that size.
        train_from: None: frozen; "all"; or the first stage (a dotted name) that is trained.
        batch_norm: "frozen" keeps running statistics as they are, "train" updates them.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        grids: Mapping[int, tuple[int, int]],
        dim: int,
        resample: Resample = "bicubic",
        train_from: str | None = None,
        batch_norm: str = "frozen",
    ):
        super().__init__()
        self.network = network
        self.grid_of = dict(grids)
        self.sides, self.grids = tuple(grids), tuple(grids.values())
        self.grid = self.grids[0]
        self.dim = dim
        self.resample: Resample = resample
        self.batch_norm = batch_norm
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.frozen = train_from is None
        self._freeze(train_from)

    def _freeze(self, train_from: str | None) -> None:
        names = [name for name, _ in self.network.named_parameters()]
        first = len(names)
        if train_from == "all":
            first = 0
        elif train_from is not None:
            matches = [i for i, name in enumerate(names) if name.startswith(f"{train_from}.")]
            if not matches:
                modules = [name.split(".")[:-1] for name in names]
                stages = ", ".join(dict.fromkeys(".".join(parts[:k]) for parts in modules for k in (1, 2)))
                raise ValueError(
                    f"encoder.train_from={train_from!r} is no stage of the network; allowed: all, {stages}"
                )
            first = matches[0]
        for i, parameter in enumerate(self.network.parameters()):
            parameter.requires_grad_(i >= first)

    def train(self, mode: bool = True) -> "Encoder":
        """Training mode; a frozen network, its frozen stages and frozen batch norms stay in evaluation mode."""
        super().train(mode and not self.frozen)
        for module in self.network.modules():
            own = list(module.parameters())
            if own and not any(p.requires_grad for p in own):  # a stage before the first that is trained
                module.eval()
            if self.batch_norm == "frozen" and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, images: UInt8[Tensor, "N 3 S S"]) -> Float[Tensor, "N L D"]:
        """Annotation vectors, row by row over the grid of pictures of this size."""
        x = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        # Apple's layers go back wrongly or slowly in channels_last (pytorch issues 175189 and 193349)
        layout = torch.contiguous_format if x.device.type == "mps" else torch.channels_last
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.network(x.contiguous(memory_format=layout))["a"]
        return features.flatten(2).transpose(1, 2)


def build_encoder(config: EncoderConfig, *, state: dict[str, Tensor] | None = None) -> tuple[Encoder, EncoderConfig]:
    """The encoder of a config, and the config with its layer and grid filled in.

    Args:
        config: name, layer or grid, weights, image size and what is trained.
        state: weights of the cut network (from a checkpoint or a data file) to take instead of `config.weights`.

    Raises:
        ValueError: unknown network, layer, grid, stage or weights; says what is allowed.
        FileNotFoundError: the weights file is not there.
        ConnectionError: torchvision could not download its weights; says what to do.
    """
    node = find_layer(config)
    grids = _grids(config, node)
    network = _network(config.name)
    if state is None and config.weights is not None:
        _load(network, read_weights(config.name, config.weights), config.weights)
    cut = create_feature_extractor(network, {node.name: "a"}, suppress_diff_warning=True)
    if state is not None:
        _load(cut, state, "the stored encoder")
    if config.train_from is not None:
        quicken(cut)
    encoder = Encoder(
        cut,
        grids=grids,
        dim=node.channels,
        resample=config.resample,
        train_from=config.train_from,
        batch_norm=config.batch_norm,
    )
    return encoder.train(), dataclasses.replace(config, layer=node.name, grid=node.height)


def _grids(config: EncoderConfig, node: SpatialNode) -> dict[int, tuple[int, int]]:
    """The grid of this node at each of the config's sides."""
    grids = {config.image_size: (node.height, node.width)}
    for side in config.scales:
        try:
            other = find_layer(dataclasses.replace(config, layer=node.name, grid=None, image_size=side, scales=()))
        except ValueError as error:
            raise ValueError(f"encoder.scales: {side} pixels: {error}") from error
        grids[side] = (other.height, other.width)
    if len(set(grids.values())) < len(grids):
        raise ValueError(
            f"encoder.scales={list(config.scales)}: each scale must have a grid of its own (got {list(grids.values())})"
        )
    return grids


def _network(name: str) -> nn.Module:
    if name not in list_models(module=torchvision.models):
        raise ValueError(f"encoder.name={name!r} is no torchvision classification model; e.g. vgg19, resnet50")
    options: dict[str, bool] = {}
    if name in ("googlenet", "inception_v3"):  # their weights want other statistics, which they make of ImageNet's
        options = {"transform_input": True, "init_weights": True}
    if name == "googlenet":
        options["aux_logits"] = False
    with warnings.catch_warnings():
        for kind in (UserWarning, FutureWarning):
            warnings.simplefilter("ignore", kind)
        return get_model(name, weights=None, **options)


@functools.cache
def spatial_nodes(name: str, image_size: int) -> tuple[SpatialNode, ...]:
    """The nodes of a network whose output is a square feature map larger than 1x1, in order of execution.

    Pictures are square, and so are their maps: what is not has its channels last, or is none. Shapes are propagated on
    the meta device: nothing is computed and no memory taken.

    Raises:
        ValueError: the network takes no pictures of this size.
    """
    network, batch = _on_meta(name), 5  # windows of a swin are no images, though they come in the same place
    try:
        images = torch.empty(batch, 3, image_size, image_size, device="meta")
        names = get_graph_node_names(network, suppress_diff_warning=True)[1]
        extractor = create_feature_extractor(network, [n for n in names if n != "x"], suppress_diff_warning=True)
        with torch.no_grad():
            outputs = extractor(images)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"encoder.name={name!r} takes no pictures of encoder.image_size={image_size}: {one_line(error)[:200]}"
        ) from error
    return tuple(
        SpatialNode(node, *output.shape[1:])
        for node, output in outputs.items()
        if isinstance(output, Tensor) and output.dim() == 4 and len(output) == batch
        if output.shape[2] == output.shape[3] > 1 and output.shape[1] > 3  # no picture on its way to the first layer
    )


def _on_meta(name: str) -> nn.Module:
    try:
        with torch.device("meta"):
            network = _network(name).eval()
    except NotImplementedError:  # some constructors (RegNet's) compute with tensors
        network = _network(name).eval().to("meta")
    return network


def find_layer(config: EncoderConfig) -> SpatialNode:
    """The node at which the config cuts its network.

    Raises:
        ValueError: there is no such layer or grid; names those there are.
    """
    nodes = spatial_nodes(config.name, config.image_size)
    if not nodes:
        raise ValueError(f"{config.name} has no feature map larger than 1x1 at encoder.image_size={config.image_size}")
    table = CUT_NODES.get(config.name, {})
    layer = config.layer
    if layer is None and table:
        layer = table.get(config.image_size // config.grid if config.grid else next(iter(table)))
    fitting = nodes
    if config.grid is not None:
        fitting = tuple(node for node in nodes if node.height == config.grid)
        if not fitting:
            grids = sorted({node.height for node in nodes})
            raise ValueError(f"encoder.grid={config.grid} is no grid of {config.name}; allowed: {grids}")
    if layer is not None:
        fitting = tuple(node for node in fitting if node.name == layer or node.name.startswith(f"{layer}."))
        if not fitting:
            raise ValueError(f"encoder.layer={layer!r} is no feature map of {config.name}; allowed: {_listing(nodes)}")
    return fitting[-1]


def _listing(nodes: tuple[SpatialNode, ...]) -> str:
    """The last node of every stage, which is what people cut at."""
    stages: dict[str, SpatialNode] = {}
    for node in nodes:
        stages[".".join(node.name.split(".")[:2])] = node
    return ", ".join(f"{stage} ({node.height}x{node.width}x{node.channels})" for stage, node in stages.items())


_BROKEN = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    TypeError,
    LookupError,  # and the rest: of bytes that look like a pickle's, and are not
    ValueError,
    AttributeError,
    struct.error,
)
"""What reading a damaged weights file raises."""


def read_weights(name: str, weights: str) -> dict[str, Tensor]:
    """A classification network's state dict, from a file or from torchvision.

    Args:
        name: the torchvision network.
        weights: a .pth or .safetensors file (tensors only: nothing else is ever unpickled), or a name of torchvision's
            weights enum such as DEFAULT or IMAGENET1K_V1.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither a file with a state dict nor a name in the enum.
        ConnectionError: torchvision cannot download them.
    """
    path = Path(weights)
    if path.suffix in (".pth", ".pt", ".safetensors"):
        if not path.is_file():
            raise FileNotFoundError(f"encoder.weights={weights}: no such file")
        try:
            return safetensors.torch.load_file(path) if path.suffix == ".safetensors" else _tensors(path)
        except _BROKEN as error:
            raise ValueError(f"encoder.weights={weights}: not a state dict: {one_line(error)[:200]}") from error
    enum = get_model_weights(name)
    if weights not in enum.__members__:
        allowed = ", ".join(enum.__members__)
        raise ValueError(f"encoder.weights={weights!r}: allowed: {allowed}, null, a .pth or .safetensors file")
    statistics = enum[weights].transforms()
    if (tuple(statistics.mean), tuple(statistics.std)) != (IMAGENET_MEAN, IMAGENET_STD):
        raise ValueError(
            f"encoder.weights={weights!r}: they want pixels normalised by mean {statistics.mean} and deviation "
            f"{statistics.std}; allowed are those of {IMAGENET_MEAN} and {IMAGENET_STD}"
        )
    try:
        return enum[weights].get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: what came is another file
        raise ConnectionError(
            f"encoder.weights={weights}: torchvision could not download {enum[weights].url} ({error}); "
            "fetch that file on a machine with a network and pass its path, or use --encoder.weights null"
        ) from error


def _tensors(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TypeError("it holds more than named tensors")
    return state


_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
"""Classifiers at the side of GoogLeNet and Inception, which only their own training needs."""


def _load(network: nn.Module, state: dict[str, Tensor], where: str) -> None:
    own = network.state_dict()
    wanted = {name: x for name, x in state.items() if name in own or not name.startswith(_AUXILIARY)}
    try:
        network.load_state_dict(wanted)
    except RuntimeError as error:
        raise ValueError(f"encoder.weights={where}: does not fit the network: {one_line(error)[:300]}") from error
